"""Charts as inline SVG: bars with intervals, lines, scatter, squares out of a hundred.

Drawn for 360 units of width, a phone's, so that text stays readable there; colours are CSS classes
c0 to c7 of report.css, which follow the reader's light or dark. Every chart has a title and a
description for readers who do not see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from sld_edge.benchmarks.evaluation.statistics import Estimate
from sld_edge.benchmarks.html import Html, join, tag

COLOURS: Final = 8
_WIDTH, _TEXT, _LETTER = 360, 12, 6.9  # units; a letter's width is an average, on the safe side
_DASHES = ("", "7 3", "2 3", "9 3 2 3")

Box = tuple[float, float, float, float]  # left, top, right, bottom
Form = Callable[[float], str]
Scale = Callable[[float], float]


@dataclass(frozen=True, kw_only=True)
class BarGroup:
    """Bars under one label, one a series; `marks` are figures of others for the same bars."""

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
    """A point with its intervals; a line joins the points with `on_front`."""

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
    form: Form = per_cent,
) -> Html:
    """Return horizontal bars with 95 % intervals, group by group.

    `series` are (name, colour), the order of each group's bars; `mark` names the marks.
    """
    ends = [bar.high for group in groups for bar in group.bars if bar is not None]
    ends += [theirs for group in groups for theirs in group.marks if theirs is not None]
    ticks = nice_ticks(max(ends, default=1.0))
    legend, y = _legend(series, mark=mark)
    top = y = y + 4
    x = _scale(ticks, 4.0, _WIDTH - 40.0)
    parts, told = [], []
    for group in groups:
        y += 17
        label = _clipped(group.label, _WIDTH - 4)
        parts.append(_text(4, y - 4, label, kind="strong", whole=group.label))
        marks = [*group.marks, *[None] * len(series)]
        for (name, colour), bar, theirs in zip(series, group.bars, marks, strict=False):
            if bar is not None:
                parts.append(_bar(x, y, bar, colour, f"{group.label}, {name}", form))
            if theirs is not None:
                hint = tag("title", f"{group.label}, {name}, {mark}: {form(theirs)}")
                parts.append(tag("path", hint, class_="mark", d=_diamond(x(theirs), y + 0.5)))
            y += 13
        y += 5
        bars = zip(series, group.bars, strict=True)
        values = [f"{name} {form(bar.value)}" for (name, _), bar in bars if bar is not None]
        told.append(f"{group.label}: {', '.join(values)}")
    grid = [
        f'<path class="grid" d="M{x(tick):.1f} {top}V{y}"/>'
        + _text(x(tick), y + 14, form(tick), anchor="start" if tick == 0 else "middle")
        for tick in ticks
    ]
    return _svg(title, "; ".join(told), y + 20, (legend, *grid, *parts))


def line_chart(*, title: str, lines: Sequence[Line], x_title: str, form: Form = per_cent) -> Html:
    """Return curves over the numbers from 1 on, all from a baseline of zero."""
    count = max((len(line.values) for line in lines), default=1)
    legend, top = _legend([(line.name, line.colour) for line in lines], strokes=True)
    top += 8
    left, right, bottom = 42.0, _WIDTH - 10.0, top + 170
    ticks = nice_ticks(max((value for line in lines for value in line.values), default=1.0))
    y = _scale(ticks, bottom, top)
    x = _scale((0, count - 1), left, right) if count > 1 else lambda _: (left + right) / 2
    parts = [_y_grid(ticks, y, left, right, form)]
    numbers = {int(tick) for tick in nice_ticks(count - 1.0) if tick == int(tick) and tick > 0}
    parts += [
        _text(x(number - 1), bottom + 15, str(number), anchor="middle")
        for number in sorted({1, *numbers})
        if number <= count
    ]
    parts.append(_text((left + right) / 2, bottom + 31, x_title, anchor="middle"))
    told = []
    for line in lines:
        style, name = f"c{line.colour % COLOURS}", tag("title", line.name)
        points = [f"{x(i):.1f},{y(value):.1f}" for i, value in enumerate(line.values)]
        parts.append(
            f'<polyline class="line {style}"{_dashes(line.colour)} points="{" ".join(points)}">'
            f"{name}</polyline>"
        )
        if len(line.values) == 1:
            at = f'cx="{x(0):.1f}" cy="{y(line.values[0]):.1f}"'
            parts.append(f'<circle class="{style}" {at} r="4"/>')
        if line.values:
            highest = form(max(line.values))
            told.append(f"{line.name}: highest {highest}, at {_peak(line.values)} of {count}")
    return _svg(title, "; ".join(told), bottom + 38, (legend, *parts))


def scatter_chart(
    *,
    title: str,
    points: Sequence[Point],
    x_title: str,
    y_title: str,
    x_form: Form = per_cent,
    y_form: Form = per_cent,
) -> Html:
    """Return points with their intervals; a line joins the points on the front."""
    xs = nice_ticks(max(p.x.high for p in points), min(p.x.low for p in points))
    ys = nice_ticks(max(p.y.high for p in points), min(p.y.low for p in points))
    named = [(p.name, p.colour) for p in points] if len(points) < COLOURS else []
    legend, legend_end = _legend(named) if named else ("", 0.0)
    left, right, top = 46.0, _WIDTH - 14.0, legend_end + 42
    bottom = top + 214
    x, y = _scale(xs, left, right), _scale(ys, bottom, top)
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
    told = []
    for point in points:
        at_x, at_y = x(point.x.value), y(point.y.value)
        taken.append((at_x - 5, at_y - 5, at_x + 5, at_y + 5))
        told.append(f"{point.name}: {x_form(point.x.value)}, {y_form(point.y.value)}")
        parts.append(
            f'<path class="interval" d="M{x(point.x.low):.1f} {at_y:.1f}H{x(point.x.high):.1f}'
            f'M{at_x:.1f} {y(point.y.low):.1f}V{y(point.y.high):.1f}"/>'
            f'<circle class="point c{point.colour % COLOURS}" cx="{at_x:.1f}" cy="{at_y:.1f}" '
            f'r="{5 if point.on_front else 3.5}">{tag("title", told[-1])}</circle>'
        )
    # A sweep has too many points to name: the front comes first, the rest where room is.
    room = (left, top - 24, float(_WIDTH), bottom)
    for point in sorted(points, key=lambda p: not p.on_front):
        name = _clipped(point.name, 160)
        place = _free_place(x(point.x.value), y(point.y.value), name, taken, room)
        if place is not None:
            taken.append(place)
            parts.append(_text(place[0], place[3] - 3, name, kind="halo"))
    return _svg(title, "; ".join(told), bottom + 40, parts)


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
    highest = per_cent(max(values, default=0.0))
    told = f"highest {highest}, at {_peak(values)} of {len(values)}"
    return _svg(title, told, 38, (drawn,), width=80)


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


def _scale(ticks: Sequence[float], start: float, end: float) -> Scale:
    """Return the place of a value on an axis from the first tick to the last."""
    return lambda value: start + (end - start) * (value - ticks[0]) / (ticks[-1] - ticks[0])


def _bar(x: Scale, y: float, bar: Estimate, colour: int, name: str, form: Form) -> str:
    told = f"{name}: {form(bar.value)} ({form(bar.low)} to {form(bar.high)})"
    return (
        f"<g>{tag('title', told)}"
        f'<rect class="c{colour % COLOURS}" x="{x(0):.1f}" y="{y}" '
        f'width="{max(x(bar.value) - x(0), 1):.1f}" height="11"/>'
        f'<path class="interval" d="M{x(bar.low):.1f} {y + 5.5}H{x(bar.high):.1f}'
        f'M{x(bar.low):.1f} {y + 3}v5M{x(bar.high):.1f} {y + 3}v5"/>'
        f"{_text(_WIDTH - 2, y + 10, form(bar.value), anchor='end')}</g>"
    )


def _y_grid(ticks: Sequence[float], y: Scale, left: float, right: float, form: Form) -> str:
    return "".join(
        f'<path class="grid" d="M{left} {y(tick):.1f}H{right}"/>'
        + _text(left - 5, y(tick) + 4, form(tick), anchor="end")
        for tick in ticks
    )


def _diamond(x: float, y: float) -> str:
    return f"M{x:.1f} {y}l4 5-4 5-4-5z"


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
        style = f"c{colour % COLOURS}"
        if colour < 0:
            key = f'<path class="mark" d="{_diamond(x + 6, y - 9)}"/>'
        elif strokes:
            key = f'<path class="line {style}"{_dashes(colour)} d="M{x - 2:.1f} {y - 4}h15"/>'
        else:
            key = f'<rect class="{style}" x="{x:.1f}" y="{y - 9}" width="11" height="11"/>'
        parts.append(key + _text(x + 16, y, name))
        x += width + 16
    return "".join(parts), y + 8


def _free_place(x: float, y: float, name: str, taken: Sequence[Box], room: Box) -> Box | None:
    """Return a place beside a point where its name meets no other name; None without one."""
    width = len(name) * _LETTER
    for left, top in (
        *((x + 7, y - 16), (x + 7, y + 2), (x - 7 - width, y - 16), (x - 7 - width, y + 2)),
        *((x - width / 2, y - 24), (x - width / 2, y + 10)),
    ):
        right, bottom = left + width, top + 14
        inside = left >= room[0] and top >= room[1] and right <= room[2] and bottom <= room[3]
        if inside and not any(
            left < o[2] and o[0] < right and top < o[3] and o[1] < bottom for o in taken
        ):
            return left, top, right, bottom
    return None


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
