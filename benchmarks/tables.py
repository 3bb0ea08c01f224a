"""Tables of reports, the same in Markdown and in HTML."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sld_edge.benchmarks.html import Html, html_from_text, join, tag

# Markdown's own signs; an underscore inside a word means nothing there.
_SPECIAL = re.compile(r"[\\|`*\[\]#]|(?<![^\W_])_|_(?![^\W_])")


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: plain text; empty where nothing is known.
        more: texts after it: in small type, or in Markdown the first one in brackets.
        value: the key for sorting by a click on the column's head; None sorts by the text.
        strong: in bold type.
    """

    text: str = ""
    more: tuple[str, ...] = ()
    value: float | None = None
    strong: bool = False

    def markdown(self) -> str:
        """Return the cell as Markdown."""
        bracket = "".join(f" ({text})" for text in self.more[:1])
        whole = escaped("".join((self.text, bracket, *(f", {text}" for text in self.more[1:]))))
        return f"**{whole}**" if self.strong and whole else whole

    def html(self) -> Html:
        """Return the cell's inside as HTML; a long name may break after a comma."""
        shown = named(self.text)
        text = tag("strong", shown) if self.strong and shown else shown
        return join(text, *(tag("small", part) for part in self.more))

    @property
    def key(self) -> str:
        """The key for sorting."""
        return self.text if self.value is None else str(self.value)


Row = Mapping[str, Cell | str]
"""A row's cells by the name of their column; a text is a cell of its own."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows with the same columns. A column in which every cell is empty is left out.

    Attributes:
        title: the heading.
        rows: at least one; the first column names the row.
        note: how to read the table.
    """

    title: str
    rows: Sequence[Row]
    note: str = ""

    def _columns(self) -> dict[str, list[Cell]]:
        columns = {
            name: [cell if isinstance(cell := row[name], Cell) else Cell(cell) for row in self.rows]
            for name in self.rows[0]
        }
        return {name: cells for name, cells in columns.items() if any(cell.text for cell in cells)}

    def markdown(self) -> str:
        """Return heading, table and note as Markdown."""
        columns = self._columns()
        lines = [
            list(map(escaped, columns)),
            ["---", *["---:"] * (len(columns) - 1)],
            *([cell.markdown() for cell in row] for row in zip(*columns.values(), strict=True)),
        ]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join(part for part in (f"## {self.title}", table, self.note) if part)

    def html(self, *, sortable: bool = False) -> Html:
        """Return the table alone as HTML; `sortable` is for pages that hold report.js."""
        columns = self._columns()
        heads = [
            tag("th", tag("button", name, type="button") if sortable else name, scope="col")
            for name in columns
        ]
        lines = []
        for first, *rest in zip(*columns.values(), strict=True):
            cells = [tag("th", first.html(), scope="row", data_value=first.key)]
            cells += [tag("td", cell.html(), data_value=cell.key) for cell in rest]
            lines.append(tag("tr", *cells))
        body = join(tag("thead", tag("tr", *heads)), tag("tbody", *lines))
        table = tag("table", body, class_="sorted" if sortable else "")
        return tag(
            "div", table, class_="scroll", role="region", tabindex="0", aria_label=self.title
        )


def named(name: str) -> Html:
    """Return a name as HTML; a long one, as a sweep's, may break after a comma."""
    return Html(html_from_text(name).replace(",", ",<wbr>"))


def escaped(text: str) -> str:
    """Return text from outside as Markdown that shows it, on one line and inside one cell."""
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return _SPECIAL.sub(r"\\\g<0>", plain)
