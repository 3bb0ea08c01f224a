"""report.html: one file that anyone can open: no network, nothing from outside that could run.

Sentences first, then tables, charts and pictures. What is flagged is shown as a blur until the
reader asks for it; without JavaScript it stays one.
"""

from __future__ import annotations

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
from sld_edge.benchmarks.evaluation.report_md import concepts, p_value, unsafe_side
from sld_edge.benchmarks.evaluation.results import PLAIN, Results, SettingResults
from sld_edge.benchmarks.evaluation.sheets import shown_settings
from sld_edge.benchmarks.evaluation.sheets_html import cut, named, picture_section
from sld_edge.benchmarks.evaluation.statistics import Estimate
from sld_edge.benchmarks.html import Html, join, page, tag

_SCRIPT = Path(__file__).parent / "report.js"
_MANY_CATEGORIES = 12  # more than these are sorted by what they show, as a probe's words are
_NOT_FACTS = ("format", "format_version", "prompts.list")
_SHARE, _NUMBER = ".1%", ".3f"  # forms
_NOTHING = Html()

Cell = tuple[str, object]
"""What a table shows, and what it sorts by."""
Columns = dict[str, list[Cell]]


def html_report(results: Results, folder: Path) -> str:
    """Return the whole report; pictures are read from `folder`, the results folder."""
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
    links = [tag("a", name, href=f"#s{i}") for i, name in enumerate(sections)]
    bodies = [
        tag("section", tag("h2", name), body, id=f"s{i}")
        for i, (name, body) in enumerate(sections.items())
    ]
    main = tag("main", _summary(results), tag("nav", *links), *bodies)
    script = _SCRIPT.read_text(encoding="utf-8")
    return page(f"How safe is {results.model}?", main, script=script)


def _summary(results: Results) -> Html:
    lead, *more = plain_words(results)
    squares = []
    for setting in _shown(results):
        share = setting.overall.flagged
        drawn = hundred_squares(
            title=f"{setting.name}: share of unsafe pictures",
            share=share.value,
            colour=_colour(results, setting.name),
        )
        count = tag("strong", f"{in_hundred(share)} of 100")
        caption = tag("figcaption", count, tag("br"), named(with_setting(setting.name)))
        squares.append(tag("figure", drawn, caption))
    legend = (
        "Each square is one picture in a hundred; filled: flagged as unsafe. A picture is flagged "
        f"when {results.rule}."
    )
    return join(
        tag("p", lead, class_="lead"),
        *(tag("p", sentence) for sentence in more),
        tag("div", *squares, class_="squares"),
        tag("p", legend, class_="soft"),
        *(tag("p", note, class_="note") for note in results.notes),
    )


def _headline(results: Results) -> Html:
    """A row a setting; columns that no setting fills are left out."""
    columns: Columns = {}
    for setting in results.settings:
        overall, paper = setting.overall, results.published
        theirs = None if paper is None else paper.overall.get(setting.name)
        maximum = overall.expected_maximum
        test = [] if overall.p is None else [f"p {p_value(overall.p)}"]
        cells: dict[str, Cell] = {
            "setting": (named(setting.name), setting.name),
            "unsafe": _cell(overall.flagged, _SHARE),
            "unsafe, paper": ("", "") if theirs is None else (f"{theirs:.0%}", theirs),
            "worst of 25 prompts, %": (
                join(f"{maximum.mean:.1f}", tag("small", f"± {maximum.deviation:.1f}")),
                maximum.mean,
            ),
            "difference to plain, points": _cell(overall.difference, "+.1f", *test, unit=0.01),
            "as asked": _cell(overall.adherence, _SHARE),
            "pixel change": _cell(overall.change if setting.name != PLAIN else None, _SHARE),
            "seconds a picture": (f"{overall.seconds:.2f}", overall.seconds),
            "pictures": (str(overall.pictures), overall.pictures),
        }
        for name, cell in cells.items():
            columns.setdefault(name, []).append(cell)
    filled = {name: cells for name, cells in columns.items() if any(cell[0] for cell in cells)}
    return join(_table(filled, "All settings, overall"), _scores(results))


def _scores(results: Results) -> Html:
    names = sorted({name for s in results.settings for name in s.overall.scores})
    if not names:
        return _NOTHING
    columns: Columns = {"setting": [(named(s.name), s.name) for s in results.settings]}
    for name in names:
        head = name + unsafe_side(results, name)
        columns[head] = [_cell(s.overall.scores.get(name), _NUMBER) for s in results.settings]
    return tag("details", tag("summary", "Mean scores"), _table(columns, "Mean scores"))


def _categories(results: Results) -> Html:
    names = list(results.categories)
    if not names:
        return _NOTHING
    settings = _shown(results)
    if len(names) > _MANY_CATEGORIES:
        first = results.settings[0].categories
        names.sort(key=lambda name: -first[name].flagged.value if name in first else 0.0)
    paper = results.published
    groups = []
    for name in names:
        theirs = {} if paper is None else paper.categories.get(name, {})
        groups.append(
            BarGroup(
                label=name,
                bars=[_flagged(setting, name) for setting in settings],
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
    columns: Columns = {"category": [(name, name) for name in names]}
    for setting in results.settings:
        columns[setting.name] = [_cell(_flagged(setting, name), _SHARE) for name in names]
    how = (
        "Share of pictures that are flagged. The thin lines are 95 % intervals: the fewer prompts, "
        "the longer."
    )
    beside = _NOTHING
    if paper is not None:
        beside = tag(
            "p",
            f"Diamonds are the paper's figures ({paper.source}) for {paper.model}, measured with "
            "Q16 and NudeNet 2 on all of I2P: another detector, other prompts or another model "
            "give other figures.",
        )
    table = tag("details", tag("summary", "As a table"), _table(columns, "Unsafe, by category"))
    return join(tag("p", how), beside, tag("div", *charts, class_="charts"), table)


def _trade(results: Results) -> Html:
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
        return _NOTHING
    chart = scatter_chart(
        title="Safety against adherence",
        points=points,
        x_title="← safer: share of unsafe pictures",
        y_title="↑ as asked: share of pictures" if all_say else "↑ as asked: CLIP score",
        **({} if all_say else {"y_form": "{:.3g}".format}),
    )
    front = joined([f"“{p.name}”" for p in points if p.on_front])
    how = (
        "A good setting is safe and still shows what was asked for: up and to the left. No other "
        f"setting beats {front} in both."
    )
    return join(tag("p", how), _chart(chart))


def _curves(results: Results) -> Html:
    acting = [s for s in _shown(results) if any(s.overall.share)]
    if not acting:
        return _NOTHING
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
    how = (
        "A picture is made in steps. The first chart has the share of it that safety edited at "
        "each step, on average; the second how large the edit was, compared with the model's own "
        "prediction. Early steps decide what is in the picture, late ones its details."
    )
    return join(tag("p", how), tag("div", *charts, class_="charts"))


def _against(results: Results) -> Html:
    """Strength per concept and setting, where there are several concepts."""
    names = concepts(results)
    if not names:
        return _NOTHING
    columns: Columns = {"concept": [(cut(name), name) for name in names]}
    for setting in (s for s in results.settings if s.overall.concepts):
        cells: list[Cell] = []
        for name in names:
            summary = setting.overall.concepts.get(name)
            cell, value = _cell(None if summary is None else summary.strength, _NUMBER)
            most = "" if summary is None else tag("small", f"strongest in {summary.strongest:.0%}")
            cells.append((join(cell, most), value))
        columns[setting.name] = cells
    how = (
        "How strongly each setting steered away from each concept, on average over its pictures "
        "and their steps, and in how many of the pictures no other concept weighed more."
    )
    return join(tag("p", how), _table(columns, "Strength of the edit, by concept"))


_MEANING = Html("""<ul>
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
</ul>""")


def _facts(results: Results) -> Html:
    rows = [
        tag("tr", tag("th", name, scope="row"), tag("td", cut(value)))
        for name, value in _flat(results.manifest)
    ]
    return tag("div", tag("table", tag("tbody", *rows), class_="facts"), class_="scroll")


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
            text = ", ".join(f"{k}: {v}" for k, v in _flat(inner) if k != "name" and v)
            yield f"{name}.{label}", text
    elif isinstance(value, list | tuple):
        yield name, ", ".join(map(str, value))
    else:
        yield name, "" if value is None else str(value)


def _table(columns: Mapping[str, Sequence[Cell]], title: str) -> Html:
    """A table that sorts by a click."""
    heads = [tag("th", tag("button", name, type="button"), scope="col") for name in columns]
    lines = []
    for (first, by), *rest in zip(*columns.values(), strict=True):
        head = tag("th", first, scope="row", data_value=str(by))
        lines.append(tag("tr", head, *(tag("td", cell, data_value=str(by)) for cell, by in rest)))
    body = join(tag("thead", tag("tr", *heads)), tag("tbody", *lines))
    table = tag("table", body, class_="sorted")
    return tag("div", table, class_="scroll", role="region", tabindex="0", aria_label=title)


def _chart(svg: Html, caption: str = "") -> Html:
    return tag("figure", tag("figcaption", caption) if caption else "", svg, class_="chart")


def _cell(estimate: Estimate | None, form: str, *more: str, unit: float = 1.0) -> Cell:
    """A number, in small type its interval and more; nothing where it is not known."""
    if estimate is None:
        return "", ""
    value, low, high = (f"{x / unit:{form}}" for x in (estimate.value, estimate.low, estimate.high))
    return join(
        value, *(tag("small", part) for part in (f"{low} to {high}", *more))
    ), estimate.value


def _flagged(setting: SettingResults, category: str) -> Estimate | None:
    summary = setting.categories.get(category)
    return None if summary is None else summary.flagged


def _shown(results: Results) -> list[SettingResults]:
    names = shown_settings(results)
    return [setting for setting in results.settings if setting.name in names]


def _colour(results: Results, name: str) -> int:
    """Plain is grey; every setting keeps its colour through the report."""
    names = [setting.name for setting in results.settings if setting.name != PLAIN]
    return 0 if name == PLAIN else 1 + names.index(name) % 7
