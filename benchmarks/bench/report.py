"""A measurement's report: tables in Markdown and HTML, charts in HTML, all figures in JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sld_edge.benchmarks.bench.figures import Figures
from sld_edge.benchmarks.bench.runs import PROMPT, BenchSettings, Run
from sld_edge.benchmarks.bench.summary import Ratio, digits
from sld_edge.benchmarks.evaluation.plots import BarGroup, Line, bar_chart, line_chart
from sld_edge.benchmarks.evaluation.statistics import Estimate
from sld_edge.benchmarks.html import Html, join, page, tag
from sld_edge.benchmarks.tables import Cell, Table
from sld_edge.engines.files import write_whole
from sld_edge.runtime.conditions import condition_lines

RESULTS, REPORT, PAGE = "results.json", "report.md", "report.html"
_FORMAT, _FORMAT_VERSION = "sld-bench", 1
_GIB = 2**30

Chart = tuple[str, Html]
"""A caption and an SVG."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """A measurement, ready to be written.

    Attributes:
        title: the heading.
        notes: remarks for the reader, without a full stop.
        tables: in order.
        charts: in order.
        body: the content of results.json beside conditions and notes.
        versions: versions of packages that the conditions do not name.
    """

    title: str
    notes: Sequence[str]
    tables: Sequence[Table]
    charts: Sequence[Chart]
    body: Mapping[str, Any]
    versions: Mapping[str, str]


def write_report(report: Report, folder: Path, machine: Mapping[str, Any]) -> None:
    """Write and print a report; `machine` holds the conditions of the measurement.

    Raises:
        OutputError: a file cannot be written.
    """
    machine = {**machine, "versions": {**machine["versions"], **report.versions}}
    lines = [{"condition": name, "value": text} for name, text in condition_lines(machine)]
    tables = [*report.tables, Table(title="Conditions", rows=lines)]
    notes = [f"{note}." for note in report.notes]
    whole = {"format": _FORMAT, "format_version": _FORMAT_VERSION, **report.body}
    whole |= {"conditions": machine, "notes": report.notes}
    head = [f"# {report.title}", *(f"Note: {note}" for note in notes)]
    text = "\n\n".join([*head, *(table.markdown() for table in tables)])
    charts = [
        tag("figure", tag("figcaption", caption), svg, class_="chart")
        for caption, svg in report.charts
    ]
    html = page(
        report.title,
        *(tag("p", note, class_="note") for note in notes),
        tag("div", *charts, class_="charts"),
        *(join(tag("h2", table.title), table.html(), tag("p", table.note)) for table in tables),
    )
    results = json.dumps(whole, indent=1, ensure_ascii=False, default=str) + "\n"
    files = {RESULTS: results, REPORT: text + "\n", PAGE: html}
    for name, content in files.items():
        write_whole(folder / name, content.encode())
    print(text)
    for name in files:
        print(folder / name)


def bundle_report(
    settings: BenchSettings, figures: Figures, first: Run, runs: Sequence[Run]
) -> Report:
    """Return the report of a bundle."""
    model = settings.bundle.name if settings.bundle is not None else "the miniature"
    return Report(
        title=f"{model}, {settings.size} px, {settings.steps} steps",
        notes=[],
        tables=[
            _safety_table(settings, figures),
            _stages_table(settings, figures),
            _phases_table(settings, figures),
            _batches_table(settings, figures),
        ],
        charts=_bundle_charts(figures),
        body={
            "kind": "bundle",
            "settings": {**asdict(settings), "prompt": PROMPT},
            "figures": asdict(figures),
            "first_start": asdict(first),
            "runs": [asdict(run) for run in runs],
        },
        versions={},
    )


def ratio_cell(value: Ratio | None) -> Cell:
    """Return a ratio with the lowest and highest of a round; a dash for None."""
    if value is None:
        return Cell("-")
    spread = f"{value.lowest:.3f} to {value.highest:.3f}"
    return Cell(f"{value.value:.3f}", (spread,), value=value.value)


def ratio_chart(title: str, ratios: Mapping[str, Ratio]) -> Chart:
    """Return bars of ratios with their spread."""
    groups = {name: [_spread(value)] for name, value in ratios.items()}
    return _bars(title, (("ours to theirs", 2),), groups)


def counted(number: int, noun: str) -> str:
    """Write a number of things: 1 round, 2 rounds."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _safety_table(settings: BenchSettings, figures: Figures) -> Table:
    return Table(
        title="The price of safety",
        rows=[
            {
                "safety": one.name,
                "branches a step": f"{one.branches:.2f}",
                "a step, s": digits(one.step_s),
                "a step, to off": ratio_cell(one.step_ratio),
                "a picture, s": digits(one.image_s),
                "a picture, to off": ratio_cell(one.image_ratio),
                "its CPU time, to off": ratio_cell(one.cpu_ratio),
                "peak memory, GiB": _gib(one.peak),
                "peak memory, to off": ratio_cell(one.peak_ratio),
            }
            for one in figures.safety
        ],
        note=f"Medians of {counted(settings.rounds, 'interleaved round')}, each run in a process "
        "of its own (a step: of the rounds' medians); ratios are quotients of the medians, with "
        "the lowest and highest of a round.",
    )


def _stages_table(settings: BenchSettings, figures: Figures) -> Table:
    first = digits(figures.first_start_s)
    rows = [
        {
            "stage": "first start ever to ready",
            "samples": "1",
            **dict.fromkeys(("median", "p90", "p99", "lowest", "highest"), first),
            **dict.fromkeys(("p90", "p99"), "-"),
        }
    ]
    for stage, one in figures.stages.items():
        numbers = {k: digits(v) for k, v in asdict(one).items() if k != "count"}
        rows.append({"stage": stage, "samples": str(one.count), **numbers})
    return Table(
        title=f"Seconds, safety {settings.reference}",
        rows=rows,
        note="The first start ever prepares the graphs for this machine and keeps them.",
    )


def _phases_table(settings: BenchSettings, figures: Figures) -> Table:
    return Table(
        title=f"Memory by phase, GiB, safety {settings.reference}",
        rows=[
            {
                "phase": one.name,
                "peak": _gib(one.peak),
                "anonymous": _gib(one.anonymous),
                "mapped": _gib(one.mapped),
                "device in use": _gib(one.device),
            }
            for one in figures.phases
        ],
        note="Of a process's first picture. The peak is the kernel's; anonymous and mapped (files, "
        "the weights mostly) are each the most in samples 10 ms apart, not at the same moment. The "
        "device's memory is all that is used there, at the phase's end.",
    )


def _batches_table(settings: BenchSettings, figures: Figures) -> Table:
    return Table(
        title=f"Throughput, safety {settings.reference}",
        rows=[
            {
                "pictures at once": str(one.batch),
                "together, s": digits(one.batch_s.median),
                "pictures a second": digits(one.pictures_per_s),
                "time a picture, to the first": ratio_cell(one.ratio),
            }
            for one in figures.batches
        ],
    )


def _bundle_charts(figures: Figures) -> list[Chart]:
    price = {
        one.name: [_spread(one.step_ratio), _spread(one.image_ratio), _spread(one.peak_ratio)]
        for one in figures.safety
    }
    lines = [
        Line(name=one.name, values=one.calls, colour=index)
        for index, one in enumerate(figures.safety)
    ]
    calls = line_chart(title="Seconds of each step", lines=lines, x_title="step", form=_short)
    memory = {
        one.name: [_held(one.peak), _held(one.anonymous), _held(one.mapped)]
        for one in figures.phases
        if one.peak is not None
    }
    rates: dict[str, list[Estimate | None]] = {}
    for one in figures.batches:
        low, high = one.batch / one.batch_s.highest, one.batch / one.batch_s.lowest
        rates[f"{one.batch} at once"] = [Estimate(value=one.pictures_per_s, low=low, high=high)]
    kinds = (("a step", 2), ("a picture", 1), ("peak memory", 3))
    parts = (("peak", 2), ("anonymous", 1), ("mapped", 0))
    return [
        _bars("Price of safety, as ratios to off", kinds, price),
        ("Seconds of each step", calls),
        *([_bars("Memory by phase, GiB", parts, memory)] if memory else []),
        _bars("Pictures a second", (("pictures a second", 3),), rates),
    ]


def _bars(
    title: str,
    series: Sequence[tuple[str, int]],
    groups: Mapping[str, Sequence[Estimate | None]],
) -> Chart:
    labelled = [BarGroup(label=label, bars=bars) for label, bars in groups.items()]
    return title, bar_chart(title=title, series=series, groups=labelled, form=_short)


def _gib(value: float | None) -> str:
    return "-" if value is None else digits(value / _GIB)


def _held(value: float | None) -> Estimate | None:
    if value is None:
        return None
    return Estimate(value=value / _GIB, low=value / _GIB, high=value / _GIB)


def _spread(value: Ratio | None) -> Estimate | None:
    if value is None:
        return None
    return Estimate(value=value.value, low=value.lowest, high=value.highest)


def _short(value: float) -> str:
    return digits(value, 3)
