"""report.html: one file that anyone can open: no network, nothing from outside that could run.

Sentences first, then tables, charts and pictures. What is flagged is shown as a blur until the
reader asks for it; without JavaScript it stays one.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sld_edge.benchmarks.evaluation.plain_words import (
    in_hundred,
    joined,
    plain_words,
    with_setting,
)
from sld_edge.benchmarks.evaluation.plots import (
    BarGroup,
    Line,
    Point,
    bar_chart,
    furthest,
    hundred_squares,
    line_chart,
    scatter_chart,
)
from sld_edge.benchmarks.evaluation.plots import html_from_text as shown
from sld_edge.benchmarks.evaluation.report_md import concepts, p_value, unsafe_side
from sld_edge.benchmarks.evaluation.results import PLAIN, Results, SettingResults
from sld_edge.benchmarks.evaluation.sheets import shown_settings
from sld_edge.benchmarks.evaluation.sheets_html import cut, named, picture_section
from sld_edge.benchmarks.evaluation.statistics import Estimate

_HERE = Path(__file__).parent
_MANY_CATEGORIES = 12  # more than these are sorted by what they show, as a probe's words are
_NOT_FACTS = ("format", "format_version", "prompts.list")


def html_report(results: Results, folder: Path) -> str:
    """Return the whole report; pictures are read from `folder`, the results folder."""
    style = (_HERE / "report.css").read_text(encoding="utf-8")
    script = (_HERE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    title = f"How safe is {results.model}?"
    sections = {
        "In figures": _headline(results),
        "By category": _categories(results),
        "Safety against adherence": _trade(results),
        "When safety acted": _curves(results),
        "What safety acted against": _against(results),
        "Pictures": picture_section(results, folder),
        "What this means, and what it does not": _MEANING,
        "How it was measured": _facts(results),
    }
    sections = {name: body for name, body in sections.items() if body}
    links = "".join(f'<a href="#s{i}">{name}</a>' for i, name in enumerate(sections))
    bodies = "".join(
        f'<section id="s{i}"><h2>{name}</h2>{body}</section>'
        for i, (name, body) in enumerate(sections.items())
    )
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{shown(title)}</title><style>{style}</style></head><body>"
        f"<h1>{shown(title)}</h1><main>{_summary(results)}"
        f"<nav>{links}</nav>{bodies}</main><script>{script}</script></body></html>\n"
    )


def _summary(results: Results) -> str:
    lead, *more = plain_words(results)
    squares = "".join(
        "<figure>"
        + hundred_squares(
            title=f"{s.name}: share of unsafe pictures",
            share=s.overall.flagged.value,
            colour=_colour(results, s.name),
        )
        + f"<figcaption><strong>{in_hundred(s.overall.flagged)} of 100</strong><br>"
        f"{named(with_setting(s.name))}</figcaption></figure>"
        for s in _shown(results)
    )
    return (
        f'<p class="lead">{shown(lead)}</p>'
        + "".join(f"<p>{shown(sentence)}</p>" for sentence in more)
        + f'<div class="squares">{squares}</div>'
        f'<p class="soft">Each square is one picture in a hundred; filled: flagged as unsafe. A '
        f"picture is flagged when {shown(results.rule)}.</p>"
        + "".join(f'<p class="note">{shown(note)}</p>' for note in results.notes)
    )


def _headline(results: Results) -> str:
    """A row a setting; columns that no setting fills are left out."""
    columns: dict[str, list[tuple[str, object]]] = {}
    for setting in results.settings:
        own, paper = setting.overall, results.published
        theirs = None if paper is None else paper.overall.get(setting.name)
        maximum = own.expected_maximum
        spread = f"{maximum.mean:.1f}<small>± {maximum.deviation:.1f}</small>"
        gap = "" if own.p is None else f"<small>p {p_value(own.p).replace('<', '&lt;')}</small>"
        cells = {
            "setting": (named(setting.name), setting.name),
            "unsafe": _cell(own.flagged),
            "unsafe, paper": ("", "") if theirs is None else (f"{theirs:.0%}", theirs),
            "worst of 25 prompts, %": (spread, maximum.mean),
            "difference to plain, points": _points(own.difference, gap),
            "as asked": _cell(own.adherence),
            "pixel change": _cell(own.change if setting.name != PLAIN else None),
            "seconds a picture": (f"{own.seconds:.2f}", own.seconds),
            "pictures": (str(own.pictures), own.pictures),
        }
        for name, cell in cells.items():
            columns.setdefault(name, []).append(cell)
    filled = {name: cells for name, cells in columns.items() if any(c[0] for c in cells)}
    return _table(filled, "All settings, overall") + _scores(results)


def _scores(results: Results) -> str:
    names = sorted({name for s in results.settings for name in s.overall.scores})
    columns: dict[str, list[tuple[str, object]]] = {
        "setting": [(named(s.name), s.name) for s in results.settings]
    }
    for name in names:
        head = name + unsafe_side(results, name)
        columns[head] = [_number(s.overall.scores.get(name)) for s in results.settings]
    if not names:
        return ""
    return f"<details><summary>Mean scores</summary>{_table(columns, 'Mean scores')}</details>"


def _categories(results: Results) -> str:
    names = list(results.categories)
    if not names:
        return ""
    settings = _shown(results)
    if len(names) > _MANY_CATEGORIES:
        first = results.settings[0].categories
        names.sort(key=lambda name: -first[name].flagged.value if name in first else 0.0)
    paper = results.published
    groups = []
    for name in names:
        found = [setting.categories.get(name) for setting in settings]
        theirs = {} if paper is None else paper.categories.get(name, {})
        groups.append(
            BarGroup(
                label=name,
                bars=[None if own is None else own.flagged for own in found],
                marks=[theirs.get(setting.name) for setting in settings],
            )
        )
    half = (len(groups) + 1) // 2 if len(groups) * len(settings) > 24 else len(groups)
    charts = [
        _chart(
            bar_chart(
                title="Unsafe pictures by category",
                series=[(s.name, _colour(results, s.name)) for s in settings],
                groups=groups[start : start + half],
                mark=None if paper is None else "paper",
                reach=furthest(groups),
            )
        )
        for start in range(0, len(groups), half)
    ]
    columns: dict[str, list[tuple[str, object]]] = {
        "category": [(shown(name), name) for name in names]
    }
    for setting in results.settings:
        columns[setting.name] = [
            _cell(own.flagged if (own := setting.categories.get(name)) is not None else None)
            for name in names
        ]
    beside = (
        ""
        if paper is None
        else f"<p>Diamonds are the paper's figures ({shown(paper.source)}) for {shown(paper.model)}"
        ", measured with Q16 and NudeNet 2 on all of I2P: another detector, other prompts or "
        "another model give other figures.</p>"
    )
    return (
        "<p>Share of pictures that are flagged. The thin lines are 95 % intervals: the fewer "
        f"prompts, the longer.</p>{beside}<div class='charts'>{''.join(charts)}</div>"
        f"<details><summary>As a table</summary>{_table(columns, 'Unsafe, by category')}</details>"
    )


def _trade(results: Results) -> str:
    """Safety against adherence, where there is a measure of it."""
    all_say = all(s.overall.adherence is not None for s in results.settings)
    points = [
        Point(
            name=setting.name,
            x=setting.overall.flagged,
            y=gain,
            colour=_colour(results, setting.name),
            on_front=setting.on_front,
        )
        for setting in results.settings
        if (gain := setting.overall.gain) is not None
    ]
    if len(points) < 2:
        return ""
    chart = scatter_chart(
        title="Safety against adherence",
        points=points,
        x_title="← safer: share of unsafe pictures",
        y_title="↑ as asked: share of pictures" if all_say else "↑ as asked: CLIP score",
        **({} if all_say else {"y_form": "{:.3g}".format}),
    )
    front = joined([f"“{p.name}”" for p in points if p.on_front])
    return (
        "<p>A good setting is safe and still shows what was asked for: up and to the left. "
        f"No other setting beats {shown(front)} in both.</p>{_chart(chart)}"
    )


def _curves(results: Results) -> str:
    acting = [s for s in _shown(results) if any(s.overall.share)]
    if not acting:
        return ""
    charts = []
    for title, curves in (
        ("How much of the picture was edited", [s.overall.share for s in acting]),
        ("How strong the edit was", [s.overall.strength for s in acting]),
    ):
        lines = [
            Line(name=s.name, values=curve, colour=_colour(results, s.name))
            for s, curve in zip(acting, curves, strict=True)
            if curve
        ]
        if lines:
            x_title = "step, from noise to picture"
            charts.append(_chart(line_chart(title=title, lines=lines, x_title=x_title), title))
    return (
        "<p>A picture is made in steps. The first chart has the share of it that safety edited at "
        "each step, on average; the second how large the edit was, compared with the model's own "
        "prediction. Early steps decide what is in the picture, late ones its details.</p>"
        f"<div class='charts'>{''.join(charts)}</div>"
    )


def _against(results: Results) -> str:
    """Strength per concept and setting, where there are several concepts."""
    names = concepts(results)
    if not names:
        return ""
    columns: dict[str, list[tuple[str, object]]] = {
        "concept": [(shown(cut(name)), name) for name in names]
    }
    for setting in (s for s in results.settings if s.overall.concepts):
        cells: list[tuple[str, object]] = []
        for name in names:
            own = setting.overall.concepts.get(name)
            cell, value = _number(None if own is None else own.strength)
            most = "" if own is None else f"<small>strongest in {own.strongest:.0%}</small>"
            cells.append((cell + most, value))
        columns[setting.name] = cells
    return (
        "<p>How strongly each setting steered away from each concept, on average over its "
        "pictures and their steps, and in how many of the pictures no other concept weighed more."
        f"</p>{_table(columns, 'Strength of the edit, by concept')}"
    )


_MEANING = """<ul>
<li>A detector is a program that judges pictures, and it errs both ways. These figures compare
settings that one detector judged; a person may judge a single picture otherwise.</li>
<li>The figures are those of these prompts. Lists such as I2P are chosen to provoke a model:
ordinary prompts give fewer unsafe pictures, and someone who tries hard may get more.</li>
<li>An interval says how far chance in the choice of prompts could move a figure. It says nothing of
what the detector or the prompts leave out: zero of a hundred is not never.</li>
<li>“Worst of 25 prompts” asks how bad it gets: draw 25 prompts, take the one with the largest share
of unsafe pictures, and average over 10,000 draws.</li>
<li>The difference to plain is taken picture by picture, same prompt and same starting noise; p is
the exact McNemar test's, the chance to see so large a difference if there were none.</li>
<li>“As asked” is the share of pictures that show what the prompt names, and pixel change the mean
difference to the picture that is made without safety; both are the price of safety.</li>
</ul>"""


def _facts(results: Results) -> str:
    rows = "".join(
        f'<tr><th scope="row">{shown(name)}</th><td>{shown(cut(value))}</td></tr>'
        for name, value in _flat(results.manifest)
    )
    return f'<div class="scroll"><table class="facts"><tbody>{rows}</tbody></table></div>'


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield a manifest's leaves by their dotted names."""
    if name in _NOT_FACTS or name.rpartition(".")[2] in _NOT_FACTS:
        return
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(v, Mapping) for v in value):
        for index, inner in enumerate(value):
            label = inner.get("name", index) if isinstance(inner, Mapping) else index
            told = ", ".join(f"{k}: {v}" for k, v in _flat(inner) if k != "name" and v)
            yield f"{name}.{label}", told
    elif isinstance(value, list | tuple):
        yield name, ", ".join(map(str, value))
    else:
        yield name, "" if value is None else str(value)


def _table(columns: Mapping[str, Sequence[tuple[str, object]]], title: str) -> str:
    """A table that sorts by a click; columns of (HTML, what it sorts by)."""
    heads = "".join(
        f'<th scope="col"><button type="button">{shown(name)}</button></th>' for name in columns
    )
    lines = "".join(
        "<tr>"
        + "".join(
            f'<{"td" if index else "th scope=row"} data-value="{shown(str(value))}">{cell}'
            f"</{'td' if index else 'th'}>"
            for index, (cell, value) in enumerate(line)
        )
        + "</tr>"
        for line in zip(*columns.values(), strict=True)
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{shown(title)}">'
        f'<table class="sorted"><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def _chart(svg: str, caption: str = "") -> str:
    told = f"<figcaption>{shown(caption)}</figcaption>" if caption else ""
    return f'<figure class="chart">{told}{svg}</figure>'


def _cell(estimate: Estimate | None) -> tuple[str, float | str]:
    if estimate is None:
        return "", ""
    interval = f"<small>{estimate.low:.1%} to {estimate.high:.1%}</small>"
    return f"{estimate.value:.1%}{interval}", estimate.value


def _points(estimate: Estimate | None, more: str) -> tuple[str, float | str]:
    """A difference of shares, in percentage points."""
    if estimate is None:
        return "", ""
    value, low, high = (100 * x for x in (estimate.value, estimate.low, estimate.high))
    return f"{value:+.1f}<small>{low:+.1f} to {high:+.1f}</small>{more}", estimate.value


def _number(estimate: Estimate | None) -> tuple[str, float | str]:
    if estimate is None:
        return "", ""
    interval = f"<small>{estimate.low:.3f} to {estimate.high:.3f}</small>"
    return f"{estimate.value:.3f}{interval}", estimate.value


def _shown(results: Results) -> list[SettingResults]:
    names = shown_settings(results)
    return [setting for setting in results.settings if setting.name in names]


def _colour(results: Results, name: str) -> int:
    """Plain is grey; every setting keeps its colour through the report."""
    names = [setting.name for setting in results.settings if setting.name != PLAIN]
    return 0 if name == PLAIN else 1 + names.index(name) % 7
