"""Contact sheets: which pictures a report shows side by side, and how they go into one file.

A strip is one prompt and seed with every setting's picture: it shows the effect of safety.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image, ImageFilter

from sld_edge.benchmarks.evaluation.prompts import EvalPrompt
from sld_edge.benchmarks.evaluation.results import PLAIN, Results
from sld_edge.benchmarks.evaluation.rows import Row
from sld_edge.runtime.picture import picture_with_heat

STRIPS: Final = 8
COLUMNS: Final = 6
_SIDE, _MAP_SIDE, _VEILED_SIDE = 256, 96, 48  # pixels; a report holds about a hundred pictures
_LOSSLESS_SIDE = 128
_BLUR = 1 / 7  # of the side: shapes go, colours stay

Strips = dict[tuple[int, int], dict[str, Row]]


@dataclass(frozen=True, kw_only=True)
class Strip:
    """One prompt and seed: its pictures by setting, None where one is missing."""

    prompt: EvalPrompt
    seed: int
    pictures: tuple[Row | None, ...]


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Strips with one theme; never empty."""

    title: str
    note: str
    settings: tuple[str, ...]
    strips: tuple[Strip, ...]


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """A picture as data URIs: `shown` at once, and `hidden` until the reader asks for it.

    A flagged picture is shown as a blur; `hidden` is None where the run kept only the blur.
    """

    shown: str
    hidden: str | None


def sheets_from_results(results: Results, *, strips: int = STRIPS) -> tuple[Sheet, ...]:
    """Choose pictures: largest changes, changes of harmless pictures, and unsafe pictures left.

    A prompt appears once a sheet. Only the shown settings count, at most `COLUMNS`.
    """
    settings = shown_settings(results)
    by_key: Strips = {}
    for row in results.rows:
        if row.setting in settings:
            by_key.setdefault((row.prompt, row.image), {})[row.setting] = row
    kept = {key: by for key, by in by_key.items() if any(row.picture for row in by.values())}
    others = [s for s in results.settings if s.name in settings and s.name != PLAIN]
    safest = min(others, key=lambda s: s.overall.flagged.value, default=None)
    safest_name = safest.name if safest is not None else ""

    def harmless(by: dict[str, Row]) -> float:
        return 0.0 if PLAIN not in by or by[PLAIN].flagged else _largest_change(by)

    def missed(by: dict[str, Row]) -> float:
        return float(safest_name in by and by[safest_name].flagged)

    wanted: Sequence[tuple[str, str, Callable[[dict[str, Row]], float]]] = (
        (
            "The largest changes",
            "Same prompt, same starting noise, another setting: where safety changed most.",
            _largest_change,
        ),
        (
            "Changed although nothing was wrong",
            "Pictures that were not flagged without safety, and changed most: safety's price.",
            harmless,
        ),
        (
            "What safety missed",
            f"Still flagged with {safest_name}, of these settings the one that is flagged least.",
            missed,
        ),
    )
    return tuple(
        Sheet(
            title=title,
            note=note,
            settings=settings,
            strips=tuple(_strip(results, kept[key], settings) for key in keys),
        )
        for title, note, weight in wanted
        if (keys := _heaviest(kept, weight, strips))
    )


def shown_settings(results: Results, *, count: int = COLUMNS) -> tuple[str, ...]:
    """Return the settings that have room: plain, then the front, then the others."""
    ranked = sorted(results.settings, key=lambda s: (s.name != PLAIN, not s.on_front))
    first = [setting.name for setting in ranked[:count]]
    return tuple(setting.name for setting in results.settings if setting.name in first)


def embedded_picture(folder: Path, row: Row, *, kept_blurred: bool) -> Embedded | None:
    """Return a row's picture, smaller, without its metadata; None where none can be shown.

    `kept_blurred` says that the run kept only a blur of flagged pictures. A path that leads out of
    the folder is not followed.
    """
    picture = _opened(folder, row.picture, "RGB")
    if picture is None:
        return None
    clear = _uri(picture, _SIDE)
    if not row.flagged:
        return Embedded(shown=clear, hidden=None)
    blur = _uri(_veiled(picture), _VEILED_SIDE)
    return Embedded(shown=blur, hidden=None if kept_blurred else clear)


def embedded_map(folder: Path, row: Row) -> str | None:
    """Return the edit map over the dimmed picture as a data URI; None if it was not kept.

    A flagged picture is a blur beneath it too.
    """
    picture, heat = _opened(folder, row.picture, "RGB"), _opened(folder, row.edit_map, "L")
    if picture is None or heat is None:
        return None
    under = _veiled(picture) if row.flagged else picture
    width, height = (max(1, round(s * _MAP_SIDE / max(under.size))) for s in under.size)
    return _uri(picture_with_heat(under.resize((width, height)), heat), _MAP_SIDE)


def _opened(folder: Path, name: str | None, mode: str) -> Image.Image | None:
    if name is None:
        return None
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        return None
    try:
        with Image.open(path) as opened:
            return opened.convert(mode)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None  # cut off, or no picture; the report says "no picture kept"


def _largest_change(by: dict[str, Row]) -> float:
    return max((row.change or 0.0 for row in by.values()), default=0.0)


def _heaviest(
    candidates: Strips, weight: Callable[[dict[str, Row]], float], count: int
) -> list[tuple[int, int]]:
    """Return the keys of the greatest weights above zero, greatest first, a prompt once."""
    weights = {key: weight(by) for key, by in candidates.items()}
    first: dict[int, tuple[int, int]] = {}
    for key in sorted(weights, key=lambda key: -weights[key]):
        if weights[key] > 0:
            first.setdefault(key[0], key)
    return list(first.values())[:count]


def _strip(results: Results, by: dict[str, Row], settings: Sequence[str]) -> Strip:
    row = next(iter(by.values()))
    return Strip(
        prompt=results.prompts[row.prompt],
        seed=row.seed,
        pictures=tuple(by.get(name) for name in settings),
    )


def _veiled(picture: Image.Image) -> Image.Image:
    small = picture.copy()
    small.thumbnail((_VEILED_SIDE, _VEILED_SIDE))
    return small.filter(ImageFilter.GaussianBlur(max(small.size) * _BLUR))


def _uri(picture: Image.Image, side: int) -> str:
    """Return a data URI of a copy, its longer side at most `side` pixels."""
    small = picture.copy()
    small.thumbnail((side, side))
    form = "PNG" if max(small.size) <= _LOSSLESS_SIDE else "JPEG"
    stream = io.BytesIO()
    small.save(stream, form, **({"quality": 82} if form == "JPEG" else {"optimize": True}))
    return f"data:image/{form.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"
