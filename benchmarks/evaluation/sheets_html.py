"""The report's pictures: side by side, with where, when and against what safety acted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sld_edge.benchmarks.evaluation.plots import spark_line
from sld_edge.benchmarks.evaluation.results import PLAIN, Results
from sld_edge.benchmarks.evaluation.rows import Row
from sld_edge.benchmarks.evaluation.sheets import (
    Strip,
    embedded_map,
    embedded_picture,
    sheets_from_results,
)
from sld_edge.benchmarks.html import Html, join, tag
from sld_edge.benchmarks.tables import named

_LONG = 300  # letters of a prompt or a manifest's value
_CONCEPT = 60  # letters of a concept under a picture
_NOTHING = Html()


def picture_section(results: Results, folder: Path) -> Html:
    """Return the contact sheets; pictures are read from `folder`. Empty where none were kept."""
    sheets = join(
        *(
            join(
                tag("h3", sheet.title),
                tag("p", sheet.note),
                *(_strip(strip, sheet.settings, results, folder) for strip in sheet.strips),
            )
            for sheet in sheets_from_results(results)
        )
    )
    if 'class="acted"' not in sheets:
        return sheets
    how = (
        "Beneath a picture, where safety acted on it: dark red little, yellow most, each against "
        "its own largest edit. The curve beside it says when: the strength of the edit at each "
        "step, pictures of one row to the same scale."
    )
    return join(tag("p", how), sheets)


def cut(text: str, longest: int = _LONG) -> str:
    """Return text, or as much of it as there is room for."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _strip(strip: Strip, settings: Sequence[str], results: Results, folder: Path) -> Html:
    blurred = results.manifest.get("images") == "blur"
    reach = max((max(row.strength, default=0.0) for row in strip.pictures if row), default=0.0)
    figures = []
    for name, row in zip(settings, strip.pictures, strict=True):
        parts = [_picture(folder, row, blurred), tag("figcaption", named(name), _caption(row))]
        figures.append(tag("figure", *parts, _acted(folder, row, reach)))
    text = strip.prompt.text if strip.prompt.text.strip() else "(empty prompt)"
    which = tag("small", f"prompt {strip.prompt.index}, seed {strip.seed}")
    head = tag("p", tag("bdi", cut(text)), " ", which)
    return tag("div", head, tag("div", *figures, class_="pictures"), class_="strip")


def _picture(folder: Path, row: Row | None, blurred: bool) -> Html:
    if row is None or (made := embedded_picture(folder, row, kept_blurred=blurred)) is None:
        return tag("div", "no picture kept", class_="absent")
    image = {"alt": row.setting, "src": made.shown}
    if not row.flagged:
        return tag("img", **image)
    if made.hidden is None:
        return tag("div", tag("img", **image), tag("span", "kept blurred"), class_="veil")
    return tag(
        "button",
        tag("img", **image, data_hidden=made.hidden),
        tag("span", "show"),
        class_="veil",
        type="button",
        aria_pressed="false",
        aria_label=f"show the flagged picture, {row.setting}",
    )


def _acted(folder: Path, row: Row | None, reach: float) -> Html:
    """Where, when and against what safety acted; nothing where it did not."""
    if row is None or not any(row.strength):
        return _NOTHING
    uri = embedded_map(folder, row)
    title = f"{row.setting}: strength of the edit at each step"
    image = _NOTHING if uri is None else tag("img", alt=f"where {row.setting} acted", src=uri)
    line = spark_line(title=title, values=row.strength, reach=reach)
    most = _NOTHING
    if len(row.concepts) > 1 and row.strongest_concept is not None:
        most = tag("small", f"most against: {cut(row.strongest_concept, _CONCEPT)}")
    return tag("div", image, line, most, class_="acted")


def _caption(row: Row | None) -> Html:
    if row is None:
        return _NOTHING
    badge = join(" ", tag("span", "flagged", class_="badge")) if row.flagged else _NOTHING
    if row.change is None or row.setting == PLAIN:
        return badge
    return join(badge, tag("br"), tag("small", f"changed by {row.change:.1%}"))
