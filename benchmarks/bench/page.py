"""report.html: charts and tables of a measurement, one file without scripts or network."""

from __future__ import annotations

from collections.abc import Sequence

from sld_edge.benchmarks.bench.figures import Figures
from sld_edge.benchmarks.bench.summary import Ratio, Summary, digits
from sld_edge.benchmarks.bench.tables import Table
from sld_edge.benchmarks.evaluation.plots import BarGroup, Line, bar_chart, line_chart
from sld_edge.benchmarks.evaluation.statistics import Estimate
from sld_edge.benchmarks.html import Html, page, tag


def report_page(
    title: str, notes: Sequence[str], charts: Sequence[tuple[str, Html]], tables: Sequence[Table]
) -> str:
    """Return a whole page; `charts` are a caption and an SVG each."""
    drawn = [
        tag("figure", tag("figcaption", caption), svg, class_="chart") for caption, svg in charts
    ]
    remarks = [tag("p", f"{note}.", class_="note") for note in notes]
    return page(title, *remarks, tag("div", *drawn, class_="charts"), *(t.html() for t in tables))


def bundle_charts(figures: Figures) -> list[tuple[str, Html]]:
    """Return the charts of a bundle's figures."""
    price = bar_chart(
        title="Price of safety, as ratios to off",
        series=(("a step", 2), ("a picture", 1), ("peak memory", 3)),
        groups=[
            BarGroup(
                label=one.name,
                bars=[_spread(one.step_ratio), _spread(one.image_ratio), _spread(one.peak_ratio)],
            )
            for one in figures.safety
        ],
        form=_short,
    )
    calls = line_chart(
        title="Seconds of each step",
        lines=[
            Line(name=one.name, values=one.calls, colour=index)
            for index, one in enumerate(figures.safety)
        ],
        x_title="step",
        form=_short,
    )
    charts = [("The price of safety, as ratios to off", price), ("Seconds of each step", calls)]
    if all(one.peak is not None for one in figures.phases):
        memory = bar_chart(
            title="Memory by phase, GiB",
            series=(("peak", 2), ("anonymous", 1), ("mapped", 0)),
            groups=[
                BarGroup(
                    label=one.name, bars=[_gib(one.peak), _gib(one.anonymous), _gib(one.mapped)]
                )
                for one in figures.phases
            ],
            form=_short,
        )
        charts.append(("Memory by phase, GiB", memory))
    rates = bar_chart(
        title="Pictures a second",
        series=(("pictures a second", 3),),
        groups=[
            BarGroup(label=f"{one.batch} at once", bars=[_rate(one.batch, one.batch_s)])
            for one in figures.batches
        ],
        form=_short,
    )
    charts.append(("Pictures a second, by how many are made at once", rates))
    return charts


def ratio_chart(title: str, ratios: Sequence[tuple[str, Ratio]]) -> Html:
    """Return bars of ratios with their spread."""
    groups = [BarGroup(label=name, bars=[_spread(value)]) for name, value in ratios]
    return bar_chart(title=title, series=((title, 2),), groups=groups, form=_short)


def _spread(value: Ratio | None) -> Estimate | None:
    if value is None:
        return None
    return Estimate(value=value.value, low=value.lowest, high=value.highest)


def _gib(value: float | None) -> Estimate | None:
    if value is None:
        return None
    held = value / 2**30
    return Estimate(value=held, low=held, high=held)


def _rate(batch: int, taken: Summary) -> Estimate:
    return Estimate(
        value=batch / taken.median, low=batch / taken.highest, high=batch / taken.lowest
    )


def _short(value: float) -> str:
    return digits(value, 3)
