"""report.md: the figures as Markdown tables."""

from __future__ import annotations

from sld_edge.benchmarks.evaluation.plain_words import plain_words
from sld_edge.benchmarks.evaluation.report_tables import (
    MEANING,
    category_table,
    concept_table,
    overall_table,
    paper_note,
    score_table,
    short_table,
)
from sld_edge.benchmarks.evaluation.results import Results
from sld_edge.benchmarks.tables import escaped


def markdown_report(results: Results) -> str:
    """Return the whole report."""
    first = results.settings[0].overall
    tables = (short_table, overall_table, category_table, concept_table, score_table)
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
