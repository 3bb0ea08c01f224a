"""A measurement as tables, in Markdown or HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sld_edge.benchmarks.bench.conditions import condition_lines
from sld_edge.benchmarks.bench.figures import Figures
from sld_edge.benchmarks.bench.runs import BenchSettings
from sld_edge.benchmarks.bench.summary import Ratio, digits
from sld_edge.benchmarks.html import Html, join, tag

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Table:
    """A title, a head, rows of cells, and a sentence on how to read it."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        """Return it as Markdown, a blank line between its parts."""
        lines = [_row(self.head), _row(["---", *["---:"] * (len(self.head) - 1)])]
        table = "\n".join([*lines, *map(_row, self.rows)])
        return "\n\n".join(part for part in (f"## {self.title}", table, self.note) if part)

    def html(self) -> Html:
        """Return it as a section of a page."""
        head = tag("thead", tag("tr", *(tag("th", name) for name in self.head)))
        rows = [
            tag("tr", tag("th", first), *(tag("td", cell) for cell in rest))
            for first, *rest in self.rows
        ]
        table = tag("table", head, tag("tbody", *rows))
        return join(tag("h2", self.title), tag("div", table, class_="scroll"), tag("p", self.note))


def bundle_tables(settings: BenchSettings, figures: Figures) -> list[Table]:
    """Return the tables of a bundle's figures."""
    return [
        _safety_table(settings, figures),
        _stages_table(settings, figures),
        _phases_table(settings, figures),
        _batches_table(settings, figures),
    ]


def conditions_table(machine: Mapping[str, Any]) -> Table:
    """Return what it was measured on."""
    return Table(title="Conditions", head=("", ""), rows=condition_lines(dict(machine)))


def markdown(title: str, notes: Sequence[str], tables: Sequence[Table]) -> str:
    """Return a whole report in Markdown."""
    remarks = [f"Note: {note}." for note in notes]
    return "\n\n".join([f"# {title}", *remarks, *(table.markdown() for table in tables)]) + "\n"


def ratio_text(value: Ratio | None) -> str:
    """Write a ratio with the lowest and highest of a round; a dash for none."""
    if value is None:
        return "-"
    return f"{value.value:.3f} ({value.lowest:.3f} to {value.highest:.3f})"


def counted(number: int, noun: str) -> str:
    """Write a number of things: 1 round, 2 rounds."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def gib(value: float | None) -> str:
    """Write bytes in GiB; a dash for none."""
    return digits(value / _GIB) if value is not None else "-"


def _safety_table(settings: BenchSettings, figures: Figures) -> Table:
    rows = [
        [
            one.name,
            f"{one.branches:.2f}",
            digits(one.step_s),
            ratio_text(one.step_ratio),
            digits(one.image_s),
            ratio_text(one.image_ratio),
            ratio_text(one.cpu_ratio),
            gib(one.peak),
            ratio_text(one.peak_ratio),
        ]
        for one in figures.safety
    ]
    return Table(
        title="The price of safety",
        head=(
            *("safety", "branches a step", "a step, s", "to off"),
            *("a picture, s", "to off", "its CPU time, to off", "peak memory, GiB", "to off"),
        ),
        rows=rows,
        note=f"Medians of {counted(settings.rounds, 'interleaved round')}, each run in a process "
        "of its own (a step: of the rounds' medians); ratios are quotients of the medians, with "
        "the lowest and highest of a round.",
    )


def _stages_table(settings: BenchSettings, figures: Figures) -> Table:
    rows = [
        [
            name,
            str(one.count),
            *(digits(x) for x in (one.median, one.p90, one.p99, one.lowest, one.highest)),
        ]
        for name, one in figures.stages.items()
    ]
    first = digits(figures.first_start_s)
    rows.insert(0, ["first start ever to ready", "1", first, "-", "-", first, first])
    return Table(
        title=f"Seconds, safety {settings.reference}",
        head=("", "samples", "median", "p90", "p99", "lowest", "highest"),
        rows=rows,
        note="The first start ever prepares the graphs for this machine; what it prepares is kept.",
    )


def _phases_table(settings: BenchSettings, figures: Figures) -> Table:
    return Table(
        title=f"Memory by phase, GiB, safety {settings.reference}",
        head=("phase", "peak", "anonymous", "mapped", "device in use"),
        rows=[
            [one.name, gib(one.peak), gib(one.anonymous), gib(one.mapped), gib(one.device)]
            for one in figures.phases
        ],
        note="Of a process's first picture. The peak is the kernel's; anonymous and mapped (files, "
        "the weights mostly) are each the most in samples 10 ms apart, not at the same moment. The "
        "device's memory is all that is used there, at the phase's end.",
    )


def _batches_table(settings: BenchSettings, figures: Figures) -> Table:
    return Table(
        title=f"Throughput, safety {settings.reference}",
        head=(
            "pictures at once",
            "together, s",
            "pictures a second",
            "time a picture, to the first",
        ),
        rows=[
            [
                str(one.batch),
                digits(one.batch_s.median),
                digits(one.pictures_per_s),
                ratio_text(one.ratio),
            ]
            for one in figures.batches
        ],
    )


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"
