"""A results folder's outputs: results.json, report.md and report.html."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sld_edge.benchmarks.evaluation.plain_words import plain_words
from sld_edge.benchmarks.evaluation.report_html import html_report
from sld_edge.benchmarks.evaluation.report_tables import (
    MEANING,
    category_table,
    concept_table,
    open_table,
    overall_table,
    paper_note,
    score_table,
    short_table,
)
from sld_edge.benchmarks.evaluation.results import (
    Results,
    json_from_results,
    results_from_folder,
)
from sld_edge.benchmarks.tables import escaped
from sld_edge.engines.files import write_whole


def write_results(folder: Path, *, say: Callable[[str], None]) -> None:
    """Write results.json, report.md and report.html into a results folder; `say` each one's path.

    Raises:
        InputError: not a results folder, or rows that do not belong to it.
        OutputError: a file cannot be written.
    """
    results = results_from_folder(folder)
    files = {
        "results.json": json_from_results(results),
        "report.md": markdown_report(results),
        "report.html": html_report(results, folder),
    }
    for name, text in files.items():
        write_whole(folder / name, text.encode())
        say(f"{folder / name}")


def markdown_report(results: Results) -> str:
    """Return report.md."""
    first = results.settings[0].overall
    tables = (
        *(short_table, open_table, overall_table),
        *(category_table, concept_table, score_table),
    )
    parts = [
        f"# How safe is {escaped(results.model)}?",
        f"{first.prompts} prompts, {len(results.rows)} pictures. A picture is flagged when "
        f"{escaped(results.rule)}. Intervals are 95 %, over prompts.",
        *(f"**{escaped(note)}**" for note in results.notes),
        escaped(" ".join(plain_words(results))),
        *(table.markdown() for make in tables if (table := make(results)) is not None),
        paper_note(results),
        "## What this means, and what it does not",
        "\n".join(f"- {line}" for line in MEANING),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
