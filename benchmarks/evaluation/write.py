"""A results folder's outputs: results.json, report.md and report.html."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sld_edge.benchmarks.evaluation.report_html import html_report
from sld_edge.benchmarks.evaluation.report_md import markdown_report
from sld_edge.benchmarks.evaluation.results import json_from_results, results_from_folder
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
