"""report.html: one file that anyone can open: no network, nothing from outside that could run.

Sentences first, then tables, charts and pictures. A flagged picture is shown as a blur until the
reader asks for it; without JavaScript it stays a blur.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
    hundred_squares,
    line_chart,
    scatter_chart,
)
from sld_edge.benchmarks.evaluation.report_tables import (
    MEANING,
    category_names,
    category_table,
    concept_table,
    open_table,
    overall_table,
    paper_note,
    score_table,
    suite_table,
)
from sld_edge.benchmarks.evaluation.results import PLAIN, Results, SettingResults
from sld_edge.benchmarks.evaluation.sheets import shown_settings
from sld_edge.benchmarks.evaluation.sheets_html import cut, picture_section
from sld_edge.benchmarks.html import Html, join, page, tag
from sld_edge.benchmarks.tables import Table, named

_SCRIPT = Path(__file__).parent / "report.js"
_NOT_FACTS = ("format", "format_version", "prompts.list")
_NOTHING = Html()


def html_report(results: Results, folder: Path) -> str:
    """Return the whole report; pictures are read from `folder`, the results folder."""
    against = concept_table(results)
    sections = {
        "By suite": _suites(results),
        "In figures": join(overall_table(results).html(sortable=True), _scores(results)),
        "By category": _categories(results),
        "Safety against adherence": _trade(results),
        "When safety acted": _curves(results),
        "What safety acted against": _NOTHING
        if against is None
        else join(tag("p", against.note), against.html(sortable=True)),
        "Pictures": picture_section(results, folder),
        "What this means, and what it does not": tag("ul", *(tag("li", line) for line in MEANING)),
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


def _suites(results: Results) -> Html:
    tables = [table for make in (suite_table, open_table) if (table := make(results)) is not None]
    return join(
        *(
            join(
                tag("h3", table.title) if number else _NOTHING,
                tag("p", table.note),
                table.html(sortable=True),
            )
            for number, table in enumerate(tables)
        )
    )


def _scores(results: Results) -> Html:
    table = score_table(results)
    return _NOTHING if table is None else _folded(table.title, table)


def _categories(results: Results) -> Html:
    table = category_table(results)
    if table is None:
        return _NOTHING
    settings, paper = _shown(results), results.published
    groups = []
    for name in category_names(results):
        theirs = {} if paper is None else paper.categories.get(name, {})
        summaries = [setting.categories.get(name) for setting in settings]
        groups.append(
            BarGroup(
                label=name,
                bars=[None if summary is None else summary.flagged for summary in summaries],
                marks=[theirs.get(setting.name) for setting in settings],
            )
        )
    chart = bar_chart(
        title="Unsafe pictures by category",
        series=[(s.name, _colour(results, s.name)) for s in settings],
        groups=groups,
        mark=None if paper is None else "paper",
    )
    how = f"{table.note} The thin lines are the intervals: the fewer prompts, the longer."
    beside = _NOTHING if paper is None else tag("p", f"Diamonds: {paper_note(results)}")
    return join(tag("p", how), beside, _chart(chart), _folded("As a table", table))


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
    if not charts:
        return _NOTHING
    how = (
        "A picture is made in steps. The first chart has the share of it that safety edited at "
        "each step, on average; the second how large the edit was, compared with the model's own "
        "prediction. Early steps decide what is in the picture, late ones its details."
    )
    return join(tag("p", how), tag("div", *charts, class_="charts"))


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


def _folded(summary: str, table: Table) -> Html:
    return tag("details", tag("summary", summary), table.html(sortable=True))


def _chart(svg: Html, caption: str = "") -> Html:
    return tag("figure", tag("figcaption", caption) if caption else "", svg, class_="chart")


def _shown(results: Results) -> list[SettingResults]:
    names = shown_settings(results)
    return [setting for setting in results.settings if setting.name in names]


def _colour(results: Results, name: str) -> int:
    """Plain is grey; every setting keeps its colour through the report."""
    names = [setting.name for setting in results.settings if setting.name != PLAIN]
    return 0 if name == PLAIN else 1 + names.index(name) % 7
