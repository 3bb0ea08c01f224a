"""The report's pictures: side by side, with where, when and against what safety acted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sld_edge.benchmarks.evaluation.plots import html_from_text as shown
from sld_edge.benchmarks.evaluation.plots import spark_line
from sld_edge.benchmarks.evaluation.results import PLAIN, Results
from sld_edge.benchmarks.evaluation.rows import Row
from sld_edge.benchmarks.evaluation.sheets import (
    Sheet,
    Strip,
    embedded_map,
    embedded_picture,
    sheets_from_results,
)

_LONG = 300  # letters of a prompt or a manifest's value
_CONCEPT = 60  # letters of a concept under a picture


def picture_section(results: Results, folder: Path) -> str:
    """Return the contact sheets; pictures are read from `folder`. Empty where none were kept."""
    sheets = "".join(_sheet(sheet, results, folder) for sheet in sheets_from_results(results))
    if 'class="acted"' not in sheets:
        return sheets
    return (
        "<p>Beneath a picture, where safety acted on it: dark red little, yellow most, each "
        "against its own largest edit. The curve beside it says when: the strength of the edit at "
        "each step, pictures of one row to the same scale.</p>" + sheets
    )


def _sheet(sheet: Sheet, results: Results, folder: Path) -> str:
    strips = "".join(_strip(strip, sheet.settings, results, folder) for strip in sheet.strips)
    return f"<h3>{shown(sheet.title)}</h3><p>{shown(sheet.note)}</p>{strips}"


def _strip(strip: Strip, settings: Sequence[str], results: Results, folder: Path) -> str:
    blurred = results.manifest.get("images") == "blur"
    reach = max((max(row.strength, default=0.0) for row in strip.pictures if row), default=0.0)
    figures = "".join(
        f"<figure>{_picture(folder, row, blurred)}<figcaption>{named(name)}{_told(row)}"
        f"</figcaption>{_acted(folder, row, reach)}</figure>"
        for name, row in zip(settings, strip.pictures, strict=True)
    )
    text = strip.prompt.text if strip.prompt.text.strip() else "(empty prompt)"
    return (
        f'<div class="strip"><p><bdi>{shown(cut(text))}</bdi> <small>prompt '
        f"{strip.prompt.index}, seed {strip.seed}</small></p>"
        f'<div class="pictures">{figures}</div></div>'
    )


def _picture(folder: Path, row: Row | None, blurred: bool) -> str:
    if row is None or (made := embedded_picture(folder, row, kept_blurred=blurred)) is None:
        return '<div class="absent">no picture kept</div>'
    image = f'<img alt="{shown(row.setting)}" src="{made.shown}"'
    if not row.flagged:
        return f"{image}>"
    if made.hidden is None:
        return f'<div class="veil">{image}><span>kept blurred</span></div>'
    return (
        f'<button class="veil" type="button" aria-pressed="false" '
        f'aria-label="show the flagged picture, {shown(row.setting)}">'
        f'{image} data-hidden="{made.hidden}"><span>show</span></button>'
    )


def _acted(folder: Path, row: Row | None, reach: float) -> str:
    """Where, when and against what safety acted; nothing where it did not."""
    if row is None or not any(row.strength):
        return ""
    uri = embedded_map(folder, row)
    title = f"{row.setting}: strength of the edit at each step"
    image = "" if uri is None else f'<img alt="where {shown(row.setting)} acted" src="{uri}">'
    line = spark_line(title=title, values=row.strength, reach=reach)
    most = ""
    if len(row.concepts) > 1 and row.strongest_concept is not None:
        most = f"<small>most against: {shown(cut(row.strongest_concept, _CONCEPT))}</small>"
    return f'<div class="acted">{image}{line}{most}</div>'


def _told(row: Row | None) -> str:
    if row is None:
        return ""
    told = ' <span class="badge">flagged</span>' if row.flagged else ""
    if row.change is not None and row.setting != PLAIN:
        told += f"<br><small>changed by {row.change:.1%}</small>"
    return told


def named(name: str) -> str:
    """Return a setting's name as HTML; a sweep's are long, and may break after a comma."""
    return shown(name).replace(",", ",<wbr>")


def cut(text: str, longest: int = _LONG) -> str:
    """Return text, or as much of it as there is room for."""
    return text if len(text) <= longest else text[: longest - 1] + "…"
