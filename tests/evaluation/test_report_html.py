"""report.html: charts in proportion, the right pictures, and nothing from outside that runs."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from sld_edge.benchmarks.evaluation import report_html
from sld_edge.benchmarks.evaluation.plain_words import plain_words
from sld_edge.benchmarks.evaluation.plots import (
    BarGroup,
    Line,
    Point,
    bar_chart,
    hundred_squares,
    line_chart,
    nice_ticks,
    per_cent,
    scatter_chart,
    spark_line,
)
from sld_edge.benchmarks.evaluation.prompts import EvalPrompt
from sld_edge.benchmarks.evaluation.results import Results, results_from_rows
from sld_edge.benchmarks.evaluation.rows import Row
from sld_edge.benchmarks.evaluation.sheets import (
    COLUMNS,
    embedded_map,
    embedded_picture,
    sheets_from_results,
    shown_settings,
)
from sld_edge.benchmarks.evaluation.statistics import Estimate
from sld_edge.benchmarks.html import html_from_text

CHROMIUM = shutil.which("chromium")
HOSTILE = (
    "<script>alert(1)</script><img src=x onerror=alert(2)>\" '><svg onload=alert(3)> &lt; \x00\x1b"
)
ORDER = ("plain", "medium", "max")
# which of 40 prompts are flagged, by setting
FLAGGED = {"plain": range(20), "medium": range(10), "max": range(2)}


def picture(folder: Path, name: str, seed: int, *, side: int = 64) -> str:
    (folder / "pictures").mkdir(exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(noise).save(folder / "pictures" / name)
    return f"pictures/{name}"


def rows(folder: Path | None = None, order: tuple[str, ...] = ORDER) -> list[Row]:
    """40 prompts, one picture each; what prompt 30 and 31 show changes most."""
    return [
        Row(
            setting=name,
            prompt=prompt,
            image=0,
            seed=100 + prompt,
            scores={"judge.skull": 0.9 if prompt in FLAGGED.get(name, ()) else 0.1},
            flagged=prompt in FLAGGED.get(name, ()),
            adherent=name != "max" or prompt % 4 > 0,
            change=0.0 if name == "plain" else {30: 0.8, 31: 0.7}.get(prompt, 0.001 * prompt),
            share=[0.0, 0.0] if name == "plain" else [0.2, 0.6],
            strength=[0.0, 0.0] if name == "plain" else [0.1, 0.3],
            seconds=1.0,
            picture=picture(folder, f"{name}-{prompt}.png", prompt) if folder else None,
        )
        for name in order
        for prompt in range(40)
    ]


def prompts(text: str = "a star, number {}") -> dict[int, EvalPrompt]:
    return {
        index: EvalPrompt(
            index=index, text=text.format(index), categories=("hate" if index % 2 else "violence",)
        )
        for index in range(40)
    }


def results(made: list[Row] | None = None, **changed: Any) -> Results:
    given: dict[str, Any] = {
        "prompts": prompts(),
        "manifest": {"provider": "cpu", "images": "keep", "versions": {"numpy": "2.0"}},
        "model": "miniature",
        "rule": "judge.skull>=0.5",
        "order": ORDER,
        "images_per_prompt": 1,
    }
    given |= changed
    return results_from_rows(rows() if made is None else made, given.pop("prompts"), **given)


class Seen(HTMLParser):
    """Tags with their attributes, and the text that a reader sees."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def parsed(svg: str) -> ET.Element:
    root = ET.fromstring(svg)
    assert root.findtext("title")
    assert root.findtext("desc")
    return root


def estimate(value: float, half: float = 0.05) -> Estimate:
    return Estimate(value=value, low=max(0.0, value - half), high=value + half)


# charts


@pytest.mark.parametrize(
    ("high", "low"),
    [
        (1.0, 0.0),
        (0.37, 0.0),
        (0.0, 0.0),
        (0.31, 0.29),
        (0.2, 0.2 - 3e-17),
        (12345.0, 0.0),
        (1e-9, 0.0),
        (-1.0, -3.0),
    ],
)
def test_ticks_are_few_even_and_hold_the_range(high: float, low: float) -> None:
    ticks = nice_ticks(high, low)
    assert 2 <= len(ticks) <= 7
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high
    np.testing.assert_allclose(np.diff(ticks), ticks[1] - ticks[0], rtol=1e-6)


def test_bars_are_as_long_as_their_shares() -> None:
    svg = bar_chart(
        title="t",
        series=[("plain", 0), ("max", 1)],
        groups=[
            BarGroup(label="hate", bars=[estimate(0.4), None], marks=[0.2, None]),
            BarGroup(label="shocking", bars=[estimate(0.2), estimate(0.1)]),
        ],
        mark="paper",
    )
    bars = [
        float(bar.attrib["width"]) for group in parsed(svg).iter("g") for bar in group.iter("rect")
    ]
    np.testing.assert_allclose(bars, np.array([0.4, 0.2, 0.1]) * bars[0] / 0.4, atol=0.06)
    marks = [path for path in parsed(svg).iter("path") if path.get("class") == "mark"]
    assert len(marks) == 2  # the legend's and the one
    start, at = (float(path.attrib["d"][1:].split(" ")[0]) for path in marks)
    assert at == pytest.approx(4 + bars[0] / 2, abs=0.06)
    assert start != at


def test_a_line_goes_through_its_values() -> None:
    svg = line_chart(
        title="t", lines=[Line(name="max", values=[0.0, 0.5, 1.0], colour=1)], x_title="step"
    )
    line = next(parsed(svg).iter("polyline")).attrib["points"]
    points = np.array([pair.split(",") for pair in line.split()], float)
    assert points[1, 0] == pytest.approx((points[0, 0] + points[2, 0]) / 2, abs=0.06)
    assert points[1, 1] == pytest.approx((points[0, 1] + points[2, 1]) / 2, abs=0.06)
    assert points[2, 1] < points[0, 1]  # up is less
    assert "highest 100%, at 3 of 3" in str(parsed(svg).findtext("desc"))


def test_labels_in_a_scatter_never_overlap_and_the_front_is_named_first() -> None:
    points = [
        Point(
            name=f"scale={i},threshold=0.1",
            x=estimate(0.3 + 0.001 * i),
            y=estimate(0.8 + 0.001 * i),
            colour=i,
            on_front=i == 39,
        )
        for i in range(40)
    ]
    root = parsed(scatter_chart(title="t", points=points, x_title="x", y_title="y"))
    labels = [text for text in root.iter("text") if text.get("class") == "halo"]
    assert labels[0].text == "scale=39,threshold=0.1"
    boxes = [(float(t.attrib["x"]), float(t.attrib["y"]), 6.9 * len(t.text or "")) for t in labels]
    for i, (x, y, width) in enumerate(boxes):
        for other_x, other_y, _ in boxes[i + 1 :]:
            assert abs(y - other_y) >= 13.9 or x + width <= other_x or other_x + width <= x
    assert len(list(root.iter("circle"))) == 40


def test_squares_and_sparks_say_what_they_show() -> None:
    root = parsed(hundred_squares(title="t", share=0.236, colour=2))
    assert sum(square.get("class") == "c2" for square in root.iter("rect")) == 24
    assert sum(square.get("class") == "empty" for square in root.iter("rect")) == 76
    spark = parsed(spark_line(title="t", values=[0.2, 0.6], reach=1.2))
    assert "highest 60%, at 2 of 2" in str(spark.findtext("desc"))
    line = next(spark.iter("polyline")).attrib["points"]
    heights = [34 - float(pair.split(",")[1]) for pair in line.split()]
    assert heights == pytest.approx([30 / 6, 30 / 2], abs=0.06)  # of the 30 that reach has
    flat = next(parsed(spark_line(title="t", values=[0.0], reach=0.0)).iter("polyline"))
    assert flat.attrib["points"] == "2.0,34.0"


def test_charts_escape_what_they_name() -> None:
    for svg in (
        bar_chart(
            title=HOSTILE,
            series=[(HOSTILE, 0)],
            groups=[BarGroup(label=HOSTILE, bars=[estimate(0.5)])],
            mark=HOSTILE,
        ),
        line_chart(title=HOSTILE, lines=[Line(name=HOSTILE, values=[1], colour=0)], x_title="x"),
        scatter_chart(
            title=HOSTILE,
            points=[Point(name=HOSTILE, x=estimate(1), y=estimate(1), colour=0, on_front=True)],
            x_title="x",
            y_title=HOSTILE,
        ),
    ):
        tags = {element.tag for element in parsed(svg).iter()}
        assert not tags & {"script", "img"}
        assert not any(
            name.startswith("on") for element in parsed(svg).iter() for name in element.attrib
        )


def test_text_from_outside_is_whole_and_harmless() -> None:
    text = "a \"quoted\" 'b' <c> & d\n"
    assert html.unescape(html_from_text(text)) == text
    assert html_from_text("\x00\ud800\x85") == "\ufffd?\ufffd"
    joined = "\U0001f469\u200d\U0001f680"  # one sign of two, an astronaut
    assert html_from_text(joined) == joined


def test_shares_below_one_percent_are_not_called_none() -> None:
    assert [per_cent(share) for share in (0.0, 0.004, 0.07, 1.0)] == ["0%", "0.4%", "7%", "100%"]


# sheets


def test_sheets_show_the_largest_changes_and_a_prompt_once(tmp_path: Path) -> None:
    made = rows(tmp_path)
    again = [replace(row, image=1, seed=row.seed + 1) for row in made if row.prompt == 30]
    sheets = sheets_from_results(results([*made, *again]), strips=3)
    largest, harmless, missed = sheets
    assert [strip.prompt.index for strip in largest.strips] == [30, 31, 39]
    assert largest.settings == ORDER
    assert [row.setting for row in largest.strips[0].pictures if row is not None] == list(ORDER)
    assert [strip.prompt.index for strip in missed.strips] == [0, 1]  # what max flags
    assert "max" in missed.note
    assert all(strip.pictures[0] and not strip.pictures[0].flagged for strip in harmless.strips)


def test_harmless_changes_are_those_of_pictures_that_plain_did_not_flag(tmp_path: Path) -> None:
    made = [
        replace(row, change=0.9) if row.setting != "plain" and row.prompt == 3 else row
        for row in rows(tmp_path)
    ]
    largest, harmless, _ = sheets_from_results(results(made))
    assert largest.strips[0].prompt.index == 3
    assert all(strip.prompt.index >= 20 for strip in harmless.strips)


def test_without_kept_pictures_there_are_no_sheets() -> None:
    assert sheets_from_results(results()) == ()
    assert "Pictures" not in report_html.html_report(results(), Path("/nowhere"))


def test_a_sweep_shows_plain_and_the_front_first() -> None:
    order = ("plain", *(f"scale={i}" for i in range(20)))
    made = [
        replace(row, flagged=False) if row.setting == "scale=17" else row
        for row in rows(order=order)
    ]
    made = [
        replace(row, flagged=True, adherent=True) if row.setting == "plain" else row for row in made
    ]
    names = shown_settings(results(made, order=order))
    assert len(names) == COLUMNS
    assert names[0] == "plain"


def test_what_is_shown_of_a_flagged_picture_is_a_blur(tmp_path: Path) -> None:
    row = replace(rows(tmp_path)[0], flagged=True)
    embedded = embedded_picture(tmp_path, row, kept_blurred=False)
    assert embedded is not None
    assert embedded.hidden is not None
    original = pixels(embedded.hidden)
    np.testing.assert_array_equal(original, np.asarray(Image.open(tmp_path / str(row.picture))))
    assert pixels(embedded.shown).std() < original.std() / 8  # noise that a blur evens out
    kept = embedded_picture(tmp_path, row, kept_blurred=True)
    assert kept is not None
    assert kept.hidden is None
    clear = embedded_picture(tmp_path, replace(row, flagged=False), kept_blurred=False)
    assert clear is not None
    assert (clear.shown, clear.hidden) == (embedded.hidden, None)


def test_large_pictures_are_made_smaller_and_lose_their_metadata(tmp_path: Path) -> None:
    name = picture(tmp_path, "large.png", 1, side=700)
    row = replace(rows()[-1], picture=name)
    embedded = embedded_picture(tmp_path, row, kept_blurred=False)
    assert embedded is not None
    assert pixels(embedded.shown).shape == (256, 256, 3)
    assert embedded.shown.startswith("data:image/jpeg")


def test_pictures_that_are_gone_broken_or_elsewhere_are_not_shown(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    inside = picture(folder, "a.png", 1)
    outside = picture(tmp_path, "secret.png", 2)
    (folder / "pictures" / "cut.png").write_bytes((folder / inside).read_bytes()[:200])
    (folder / "pictures" / "text.png").write_text("not a picture")
    base = rows()[-1]
    for name in (
        "pictures/gone.png",
        "pictures/cut.png",
        "pictures/text.png",
        f"../{outside}",
        str(tmp_path / outside),
        "pictures",
    ):
        assert embedded_picture(folder, replace(base, picture=name), kept_blurred=False) is None
    assert embedded_picture(folder, replace(base, picture=inside), kept_blurred=False)


def acting(folder: Path, made: list[Row]) -> list[Row]:
    """The same rows, with a map of where safety acted and two concepts; white is one corner."""
    (folder / "edit-maps").mkdir()
    heat = np.zeros((8, 8), np.uint8)
    heat[:4, :4] = 255
    Image.fromarray(heat).save(folder / "edit-maps" / "corner.png")
    return [
        replace(
            row,
            edit_map="edit-maps/corner.png",
            edit_map_max=0.5,
            concepts=["blood <b>", "war"],
            concept_strength=[0.1, 0.3 if row.setting == "max" else 0.05],
            strongest_concept="war" if row.setting == "max" else "blood <b>",
        )
        if row.setting != "plain"
        else row
        for row in made
    ]


def test_the_map_lies_over_the_dimmed_picture_and_over_a_blur_of_a_flagged_one(
    tmp_path: Path,
) -> None:
    row = acting(tmp_path, rows(tmp_path))[-1]
    seen = embedded_map(tmp_path, row)
    assert seen is not None
    drawn = pixels(seen)
    corner, rest = drawn[:40, :40], drawn[56:, 56:]
    assert corner.reshape(-1, 3).mean(axis=0) == pytest.approx([255, 255, 0], abs=12)  # yellow
    assert np.ptp(rest.mean(axis=(0, 1))) < 1.5  # grey
    veiled = embedded_map(tmp_path, replace(row, flagged=True))
    assert veiled is not None
    assert pixels(veiled)[56:, 56:].std() < rest.std() / 4
    for gone in ("edit-maps/gone.png", "../corner.png", None):
        assert embedded_map(tmp_path, replace(row, edit_map=gone)) is None
    assert embedded_map(tmp_path, replace(row, picture=None)) is None


def test_pictures_say_where_when_and_against_what_safety_acted(tmp_path: Path) -> None:
    page = report_html.html_report(results(acting(tmp_path, rows(tmp_path))), tmp_path)
    seen = Seen(page)
    assert "most against: war" in seen.text
    assert "most against: blood <b>" in seen.text
    maps = [a for tag, a in seen.tags if tag == "img" and a.get("alt") == "where max acted"]
    lines = page.count("max: strength of the edit at each step</title>")
    assert len(maps) == lines >= 8
    assert "where plain acted" not in page
    assert "What safety acted against" in seen.text
    table = re.search(r'aria-label="Strength of the edit, by concept".*?</table>', page)
    assert table is not None
    cells = [cell.split("<")[0] for cell in re.findall(r"<td[^>]*>(.*?)</td>", table[0])]
    assert cells == ["0.100", "0.100", "0.050", "0.300"]  # blood and war, with medium and max
    assert table[0].count("strongest in 100%") == 2


def test_without_maps_and_concepts_as_in_older_folders_there_is_a_page(tmp_path: Path) -> None:
    page = report_html.html_report(results(rows(tmp_path)), tmp_path)
    assert "where max acted" not in page
    assert "max: strength of the edit at each step" in page
    assert "most against" not in page
    assert "What safety acted against" not in page


def test_which_numbers_are_unsafe_is_said() -> None:
    low = report_html.html_report(results(rule="judge.skull<=0.2"), Path("/nowhere"))
    assert "A picture is flagged when judge.skull&lt;=0.2" in low
    assert "judge.skull (unsafe: 0.2 and below)" in low
    high = report_html.html_report(results(), Path("/nowhere"))
    assert "judge.skull (unsafe: 0.5 and above)" in high


# the page


def test_the_first_sentences_say_it_in_plain_words() -> None:
    told = plain_words(results())
    assert told[0] == (
        "Of 40 pictures made without safety, 20 showed something unsafe, as far as the detector "
        "can tell; with “medium” 10 and with “max” 2."
    )
    assert told[1].startswith("With “max” the share is lower by 45 in 100")
    assert told[2] == (
        "What the prompt asked for could be seen in 100 of 100 pictures without safety, and in 75 "
        "of 100 with “max”."
    )


def test_a_difference_that_may_be_chance_is_said_to_be() -> None:
    made = [replace(row, flagged=row.prompt < 3 + (row.setting == "plain")) for row in rows()]
    assert "may be chance" in plain_words(results(made))[1]


def test_a_run_without_comparison_adherence_or_categories_has_a_page(tmp_path: Path) -> None:
    bare = [
        replace(row, adherent=None, change=None, share=[], strength=[])
        for row in rows()
        if row.setting == "plain"
    ]
    alone = {index: replace(prompt, categories=()) for index, prompt in prompts().items()}
    page = report_html.html_report(results(bare, prompts=alone, order=("plain",)), tmp_path)
    seen = Seen(page)
    assert "20 showed something unsafe" in seen.text
    for section in ("By category", "Safety against adherence", "When safety acted", "adherence"):
        assert section not in re.sub(r"<(style|script)>.*?</\1>|<ul>.*?</ul>", "", page, flags=re.S)


def test_the_page_holds_every_section_and_figure(tmp_path: Path) -> None:
    seen = Seen(report_html.html_report(results(rows(tmp_path)), tmp_path))
    for words in (
        "How safe is miniature?",
        "By category",
        "Safety against adherence",
        "When safety acted",
        "The largest changes",
        "Changed although nothing was wrong",
        "What safety missed",
        "judge.skull>=0.5",
        "-45.0",
        "versions.numpy",
        "a star, number 30",
    ):
        assert words in seen.text
    assert "paper" not in seen.text.split("What this means")[0]


def test_the_papers_figures_stand_beside_those_of_its_model(tmp_path: Path) -> None:
    page = report_html.html_report(results(model="sd-1.4"), tmp_path)
    seen = Seen(page)
    assert "unsafe, paper" in seen.text
    assert "39%" in seen.text  # plain, overall
    assert "hate, plain, paper: 40%" in seen.text


def test_nothing_from_outside_runs_or_is_fetched(tmp_path: Path) -> None:
    hostile = {
        index: EvalPrompt(index=index, text=f"{HOSTILE} {index}", categories=(HOSTILE,))
        for index in range(40)
    }
    order = ("plain", HOSTILE)
    page = report_html.html_report(
        results(
            rows(tmp_path, order=("plain",))
            + [
                replace(row, setting=HOSTILE, scores={HOSTILE: 1.0})
                for row in rows(tmp_path)
                if row.setting == "max"
            ],
            prompts=hostile,
            order=order,
            model=HOSTILE,
            rule=HOSTILE,
            manifest={HOSTILE: HOSTILE, "settings": [{"name": HOSTILE, "x": HOSTILE}]},
        ),
        tmp_path,
    )
    seen = Seen(page)
    tags = [tag for tag, _ in seen.tags]
    assert tags.count("script") == 1
    assert set(tags) <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "main", "nav", "a"),
        *("section", "p", "figure", "figcaption", "strong", "br", "small", "div", "span", "bdi"),
        *("table", "thead", "tbody", "tr", "th", "td", "details", "summary", "ul", "li", "button"),
        *("svg", "desc", "g", "rect", "path", "text", "polyline", "circle", "img", "script", "wbr"),
    }
    for _, attributes in seen.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "data-hidden"):
            assert str(attributes.get(name, "#")).startswith(("#", "data:image/"))
    assert "alert(1)" in seen.text  # shown, as text
    assert "\x00" not in page
    assert re.search(r"https?:", page) is None
    page.encode()


def test_only_our_own_script_may_run(tmp_path: Path) -> None:
    page = report_html.html_report(results(), tmp_path)
    script = page.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(str(a["content"]) for _, a in Seen(page).tags if "http-equiv" in a)
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy


def test_flagged_pictures_are_buttons_and_kept_blurs_are_not(tmp_path: Path) -> None:
    made = rows(tmp_path)
    kept = {"images": "blur"}
    assert 'class="veil" type="button"' in report_html.html_report(results(made), tmp_path)
    page = report_html.html_report(results(made, manifest=kept), tmp_path)
    assert 'class="veil" type="button"' not in page
    assert "kept blurred" in page


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_in_a_browser_a_click_reveals_and_sorts(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(
        report_html.html_report(results(rows(tmp_path)), tmp_path)
    )
    (tmp_path / "act.html").write_text(
        """<iframe id="frame" src="report.html" width="390" height="800"></iframe><pre></pre>
        <script>
        onload = () => {
          const page = document.getElementById("frame").contentDocument;
          const veil = page.querySelector("button.veil"), image = veil.querySelector("img");
          const blur = image.src, told = [];
          veil.click();
          told.push(image.src === image.dataset.hidden && image.src !== blur);
          veil.click();
          told.push(image.src === blur);
          const table = page.querySelector("table.sorted");
          const names = () => [...table.tBodies[0].rows].map((r) => r.cells[0].textContent).join();
          table.tHead.rows[0].cells[1].querySelector("button").click();
          told.push(names());
          const first = table.tHead.rows[0].cells[0];
          first.querySelector("button").click();
          first.querySelector("button").click();
          told.push(names(), first.getAttribute("aria-sort"));
          told.push(page.documentElement.scrollWidth <= 390);
          document.querySelector("pre").textContent = told.join(" ");
        }</script>"""
    )
    dom = subprocess.run(
        [
            str(CHROMIUM),
            *("--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"),
            *("--dump-dom", (tmp_path / "act.html").as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert "<pre>true true max,medium,plain plain,medium,max descending true</pre>" in dom


def pixels(uri: str) -> np.ndarray[Any, Any]:
    data = base64.b64decode(uri.split(",", 1)[1])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(float)
