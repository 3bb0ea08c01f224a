"use strict";
for (const veil of document.querySelectorAll("button.veil")) {
  const picture = veil.querySelector("img");
  const words = veil.querySelector("span");
  const blurred = picture.src;
  veil.addEventListener("click", () => {
    const reveal = veil.getAttribute("aria-pressed") !== "true";
    veil.setAttribute("aria-pressed", String(reveal));
    picture.src = reveal ? picture.dataset.hidden : blurred;
    words.textContent = reveal ? "hide" : "show";
  });
}
for (const table of document.querySelectorAll("table.sorted")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => row.cells[column].dataset.value;
      const order = (a, b) => {
        const [x, y] = up ? [value(a), value(b)] : [value(b), value(a)];
        if (value(a) === "" || value(b) === "") {
          return (value(a) === "") - (value(b) === ""); // what is not known comes last
        }
        return x - y || String(x).localeCompare(String(y));
      };
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
    });
  });
}
