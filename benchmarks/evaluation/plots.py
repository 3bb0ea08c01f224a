"""Charts as inline SVG: bars with intervals, lines, scatter, squares out of a hundred.

Drawn for 360 units of width, a phone's, so that text stays readable there; colours are CSS classes
c0 to c7 of report.css, which follow the reader's light or dark. Every chart has a title and a
description for those who do not see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from sld_edge.benchmarks.evaluation.statistics import Estimate
from sld_edge.benchmarks.html import Html, join, tag

COLOURS: Final = 8
_WIDTH, _TEXT, _LETTER = 360, 12, 6.9  # units; a letter's width is an average, on the safe side
_DASHES = ("", "7 3", "2 3", "9 3 2 3")

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True, kw_only=True)
class BarGroup:
    """Bars under one label, one a series; `marks` are others' figures for the same."""

    label: str
    bars: Sequence[Estimate | None]
    marks: Sequence[float | None] = ()


@dataclass(frozen=True, kw_only=True)
class Line:
    """A series of values; colour and dashes go by `colour`."""

    name: str
    values: Sequence[float]
    colour: int


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point with its intervals; `on_front` joins it with the others that no one beats."""

    name: str
    x: Estimate
    y: Estimate
    colour: int
    on_front: bool


def per_cent(value: float) -> str:
    """Return a share as people read it: 7%, and 0.4% below one."""
    return f"{value:.1%}" if 0 < abs(value) < 0.01 else f"{value:.0%}"


def bar_chart(
    *,
    title: str,
    series: Sequence[tuple[str, int]],
    groups: Sequence[BarGroup],
    mark: str | None = None,
    reach: float | None = None,
    form: Callable[[float], str] = per_cent,
) -> Html:
    """Return horizontal bars with 95 % intervals, group by group.

    `series` are (name, colour), the order of each group's bars; `mark` names what marks stand for.
    The axis goes to `reach`, so that several charts may share one; by default as far as it must.
    """
    ticks = nice_ticks(reach if reach is not None else furthest(groups))
    left, right = 4.0, _WIDTH - 40.0
    legend, top = _legend(series, mark=mark)
    top += 4

    def x(value: float) -> float:
        return left + (right - left) * value / ticks[-1]

    parts, y = [], top
    for group in groups:
        y += 17
        parts.append(_label(left, y - 4, group.label, room=_WIDTH - left, kind="strong"))
        for index, ((name, colour), bar) in enumerate(zip(series, group.bars, strict=True)):
            if bar is not None:
                parts.append(_bar(x, y, bar, colour, f"{group.label}, {name}", form))
            theirs = group.marks[index] if index < len(group.marks) else None
            if theirs is not None:
                hint = tag("title", f"{group.label}, {name}, {mark}: {form(theirs)}")
                d = f"M{x(theirs):.1f} {y + 0.5}l4 5-4 5-4-5z"
                parts.append(tag("path", hint, class_="mark", d=d))
            y += 13
        y += 5
    grid = [
        f'<path class="grid" d="M{x(tick):.1f} {top}V{y}"/>'
        + _text(x(tick), y + 14, form(tick), anchor="start" if tick == 0 else "middle")
        for tick in ticks
    ]
    description = "; ".join(
        f"{group.label}: "
        + ", ".join(
            f"{name} {form(bar.value)}"
            for (name, _), bar in zip(series, group.bars, strict=True)
            if bar is not None
        )
        for group in groups
    )
    return _svg(title, description, y + 20, (legend, *grid, *parts))


def furthest(groups: Sequence[BarGroup]) -> float:
    """Return how far an axis must go to hold every interval and mark."""
    ends = [bar.high for group in groups for bar in group.bars if bar is not None]
    ends += [mark for group in groups for mark in group.marks if mark is not None]
    return max(ends, default=1.0)


def line_chart(
    *,
    title: str,
    lines: Sequence[Line],
    x_title: str,
    form: Callable[[float], str] = per_cent,
) -> Html:
    """Return curves over the numbers from 1 on, all from a baseline of zero."""
    ticks = nice_ticks(max((value for line in lines for value in line.values), default=1.0))
    count = max((len(line.values) for line in lines), default=1)
    legend, top = _legend([(line.name, line.colour) for line in lines], strokes=True)
    top += 8
    left, right, bottom = 42.0, _WIDTH - 10.0, top + 170

    def x(index: float) -> float:
        return left + (right - left) * (index / (count - 1) if count > 1 else 0.5)

    def y(value: float) -> float:
        return bottom - (bottom - top) * value / ticks[-1]

    parts = [_y_grid(ticks, y, left, right, form)]
    steps = [tick for tick in nice_ticks(count - 1.0) if tick == int(tick)] if count > 1 else [0]
    parts += [
        _text(x(tick - 1), bottom + 15, str(tick), anchor="middle")
        for tick in sorted({1, *(int(tick) for tick in steps if 1 <= tick <= count)})
    ]
    parts.append(_text((left + right) / 2, bottom + 31, x_title, anchor="middle"))
    for line in lines:
        points = " ".join(f"{x(i):.1f},{y(value):.1f}" for i, value in enumerate(line.values))
        parts.append(
            f'<polyline class="line c{line.colour % COLOURS}"{_dashes(line.colour)} '
            f'points="{points}">{tag("title", line.name)}</polyline>'
        )
        if len(line.values) == 1:
            parts.append(
                f'<circle class="c{line.colour % COLOURS}" cx="{x(0):.1f}" '
                f'cy="{y(line.values[0]):.1f}" r="4"/>'
            )
    description = "; ".join(
        f"{line.name}: highest {form(max(line.values))}, at {_peak(line.values)} of {count}"
        for line in lines
        if line.values
    )
    return _svg(title, description, bottom + 38, (legend, *parts))


def scatter_chart(
    *,
    title: str,
    points: Sequence[Point],
    x_title: str,
    y_title: str,
    x_form: Callable[[float], str] = per_cent,
    y_form: Callable[[float], str] = per_cent,
) -> Html:
    """Return points with their intervals; a line joins those on the front."""
    xs = nice_ticks(max(p.x.high for p in points), min(p.x.low for p in points))
    ys = nice_ticks(max(p.y.high for p in points), min(p.y.low for p in points))
    named = [(p.name, p.colour) for p in points] if len(points) < COLOURS else []
    legend, legend_end = _legend(named) if named else ("", 0.0)
    left, right, top = 46.0, _WIDTH - 14.0, legend_end + 42
    bottom = top + 214

    def x(value: float) -> float:
        return left + (right - left) * (value - xs[0]) / (xs[-1] - xs[0])

    def y(value: float) -> float:
        return bottom - (bottom - top) * (value - ys[0]) / (ys[-1] - ys[0])

    parts = [_y_grid(ys, y, left, right, y_form), _text(4, legend_end + 14, y_title), legend]
    for tick in xs:
        parts.append(f'<path class="grid" d="M{x(tick):.1f} {top}V{bottom}"/>')
        parts.append(_text(x(tick), bottom + 15, x_form(tick), anchor="middle"))
    parts.append(_text((left + right) / 2, bottom + 32, x_title, anchor="middle"))
    front = sorted((p for p in points if p.on_front), key=lambda p: (p.x.value, p.y.value))
    if len(front) > 1:
        path = " ".join(f"{x(p.x.value):.1f},{y(p.y.value):.1f}" for p in front)
        parts.append(f'<polyline class="front" points="{path}"/>')
    taken: list[Box] = []
    labels = []
    for point in points:
        at_x, at_y = x(point.x.value), y(point.y.value)
        taken.append((at_x - 5, at_y - 5, at_x + 5, at_y + 5))
        told = f"{point.name}: {x_form(point.x.value)}, {y_form(point.y.value)}"
        parts.append(
            f'<path class="interval" d="M{x(point.x.low):.1f} {at_y:.1f}H{x(point.x.high):.1f}'
            f'M{at_x:.1f} {y(point.y.low):.1f}V{y(point.y.high):.1f}"/>'
            f'<circle class="point c{point.colour % COLOURS}" cx="{at_x:.1f}" cy="{at_y:.1f}" '
            f'r="{5 if point.on_front else 3.5}">{tag("title", told)}</circle>'
        )
    # a sweep has too many points to name: those on the front come first, the rest where room is
    for point in sorted(points, key=lambda p: not p.on_front):
        name = _clipped(point.name, 160)
        place = _free_place(
            x(point.x.value),
            y(point.y.value),
            len(name) * _LETTER,
            taken,
            (left, top - 24, _WIDTH, bottom),
        )
        if place is not None:
            taken.append(place)
            labels.append(_text(place[0], place[3] - 3, name, kind="halo"))
    told = "; ".join(f"{p.name}: {x_form(p.x.value)}, {y_form(p.y.value)}" for p in points)
    return _svg(title, told, bottom + 40, (*parts, *labels))


def hundred_squares(*, title: str, share: float, colour: int) -> Html:
    """Return ten rows of ten squares, as many of them filled as `share`, 0 to 1, of a hundred."""
    filled = round(100 * share)
    squares = "".join(
        f'<rect class="{f"c{colour % COLOURS}" if index < filled else "empty"}" '
        f'x="{index % 10 * 12 + 1}" y="{index // 10 * 12 + 1}" width="10" height="10" rx="2"/>'
        for index in range(100)
    )
    return _svg(title, f"{filled} of 100 squares are filled", 120, (squares,), width=120)


def spark_line(*, title: str, values: Sequence[float], reach: float) -> Html:
    """Return a small curve without axes, from zero to `reach`."""
    count = max(len(values) - 1, 1)
    height = 30.0 / reach if reach > 0 else 0.0
    points = " ".join(
        f"{2 + 76 * i / count:.1f},{34 - height * value:.1f}" for i, value in enumerate(values)
    )
    drawn = f'<path class="grid" d="M2 34H78"/><polyline class="line c2" points="{points}"/>'
    description = (
        f"highest {per_cent(max(values, default=0.0))}, at {_peak(values)} of {len(values)}"
    )
    return _svg(title, description, 38, (drawn,), width=80)


def nice_ticks(high: float, low: float = 0.0) -> list[float]:
    """Return 3 to 7 round numbers, evenly apart, from at most `low` to at least `high`."""
    span = high - low
    if not span > 1e-9 * abs(high):  # one number, but for its last digits
        span = abs(high) or 1.0
        low, high = (low, high + span) if low >= 0 else (low, high)
    raw = span / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def _bar(
    x: Callable[[float], float],
    y: float,
    bar: Estimate,
    colour: int,
    name: str,
    form: Callable[[float], str],
) -> str:
    interval = f"{form(bar.low)} to {form(bar.high)}"
    return (
        f"<g>{tag('title', f'{name}: {form(bar.value)} ({interval})')}"
        f'<rect class="c{colour % COLOURS}" x="{x(0):.1f}" y="{y}" '
        f'width="{max(x(bar.value) - x(0), 1):.1f}" height="11"/>'
        f'<path class="interval" d="M{x(bar.low):.1f} {y + 5.5}H{x(bar.high):.1f}'
        f'M{x(bar.low):.1f} {y + 3}v5M{x(bar.high):.1f} {y + 3}v5"/>'
        f"{_text(_WIDTH - 2, y + 10, form(bar.value), anchor='end')}</g>"
    )


def _y_grid(
    ticks: Iterable[float],
    y: Callable[[float], float],
    left: float,
    right: float,
    form: Callable[[float], str],
) -> str:
    return "".join(
        f'<path class="grid" d="M{left} {y(tick):.1f}H{right}"/>'
        + _text(left - 5, y(tick) + 4, form(tick), anchor="end")
        for tick in ticks
    )


def _legend(
    series: Sequence[tuple[str, int]], *, mark: str | None = None, strokes: bool = False
) -> tuple[str, float]:
    """Return the legend, in as many lines as it needs, and its height."""
    parts, x, y = [], 4.0, 12.0
    entries = [*series, *([(mark, -1)] if mark is not None else [])]
    for name, colour in entries:
        name = _clipped(name, _WIDTH - 30)
        width = 18 + len(name) * _LETTER
        if x > 4 and x + width > _WIDTH:
            x, y = 4.0, y + 17
        if colour < 0:
            key = f'<path class="mark" d="M{x + 6:.1f} {y - 9}l4 5-4 5-4-5z"/>'
        elif strokes:
            style = f'class="line c{colour % COLOURS}"{_dashes(colour)}'
            key = f'<path {style} d="M{x - 2:.1f} {y - 4}h15"/>'
        else:
            style = f'class="c{colour % COLOURS}"'
            key = f'<rect {style} x="{x:.1f}" y="{y - 9}" width="11" height="11"/>'
        parts.append(key + _text(x + 16, y, name))
        x += width + 16
    return "".join(parts), y + 8


def _free_place(x: float, y: float, width: float, taken: Sequence[Box], room: Box) -> Box | None:
    """Return where a label beside a point meets no other and stays in the room, if anywhere."""
    for left, top in (
        (x + 7, y - 16),
        (x + 7, y + 2),
        (x - 7 - width, y - 16),
        (x - 7 - width, y + 2),
        (x - width / 2, y - 24),
        (x - width / 2, y + 10),
    ):
        box = (left, top, left + width, top + 14)
        inside = box[0] >= room[0] and box[1] >= room[1] and box[2] <= room[2] and box[3] <= room[3]
        if inside and not any(
            box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in taken
        ):
            return box
    return None


def _label(x: float, y: float, text: str, *, room: float, kind: str) -> str:
    return _text(x, y, _clipped(text, room), kind=kind, whole=text)


def _clipped(text: str, room: float) -> str:
    letters = int(room / _LETTER)
    line = " ".join(text.split())
    return line if len(line) <= letters else line[: letters - 1] + "…"


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", kind: str = "", whole: str = ""
) -> str:
    hint = tag("title", whole) if whole and whole != text else ""
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text_anchor": anchor, "font_size": str(_TEXT)}
    return tag("text", hint, text, class_=kind, **place)


def _dashes(colour: int) -> str:
    dashes = _DASHES[colour % len(_DASHES)]
    return f' stroke-dasharray="{dashes}"' if dashes else ""


def _peak(values: Sequence[float]) -> int:
    return max(range(len(values)), key=lambda i: values[i], default=-1) + 1


def _svg(
    title: str, description: str, height: float, parts: Sequence[str], *, width: int = _WIDTH
) -> Html:
    words = join(tag("title", title), tag("desc", description))
    box = f"0 0 {width} {height:g}"
    return tag("svg", words, *map(Html, parts), role="img", viewBox=box, aria_label=title)
