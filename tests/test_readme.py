"""What the README says exists, and its Python runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from sld_edge.engines.errors import InputError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_its_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"^make (\w+)", readme, re.MULTILINE)
    assert named[:2] == ["image", "check"]
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    assert "make check" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def _parsers() -> dict[str, Callable[[list[str]], object]]:
    from sld_edge.benchmarks.bench.cli import parser as bench_parser
    from sld_edge.benchmarks.evaluation.cli import parser as eval_parser
    from sld_edge.export.commands.build import PlanOptions, build_settings
    from sld_edge.export.commands.build import parser as build_parser
    from sld_edge.export.commands.export import parser as export_parser
    from sld_edge.runtime.commands.arguments import parsed
    from sld_edge.runtime.commands.options import parser as run_parser

    return {
        "sld-run": run_parser().parse_args,
        "sld-eval": eval_parser().parse_args,
        "sld-bench": bench_parser().parse_args,
        "sld-export": lambda words: build_settings(parsed(export_parser(), PlanOptions, words)),
        "sld-build": lambda words: build_settings(parsed(build_parser(), PlanOptions, words)),
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_commands_are_understood(page: Path) -> None:
    """Every command line in a page's code is taken by the command, options and values."""
    parsers, text = _parsers(), page.read_text(encoding="utf-8")
    lines = "\n".join(re.findall(r"```(?:sh|powershell)\n(.*?)```", text, re.DOTALL)).splitlines()
    for line in lines:
        for part in re.split(r" && |\|", line):
            words = shlex.split(part, comments=True)
            if words and words[0] in parsers and words[-1] != "...":
                parsers[words[0]](words[1:])


def test_a_command_that_is_not_understood_fails() -> None:
    with pytest.raises(InputError):
        _parsers()["sld-build"](["sd15", "--engine", "tensorrt-rtx", "--strip-weights"])
    with pytest.raises(InputError):
        _parsers()["sld-run"](["a star", "--no-such-option"])


def test_the_help_has_the_rates_of_the_table() -> None:
    """The share of unsafe pictures that is left: hidden, and open, rounded."""
    from sld_edge.runtime import PRESETS
    from sld_edge.runtime.commands.options import parser

    table = (ROOT / "docs" / "shield.md").read_text(encoding="utf-8").split("| setting | hidden")[1]
    shown = parser().format_help()
    for name in PRESETS:
        row = table.split(f"| {'plain' if name == 'off' else name} |")[1].splitlines()[0]
        hidden, opened, *_ = (float(cell.split("%")[0]) for cell in row.split("|")[:2])
        line = next(line for line in shown.splitlines() if line.startswith(f"  {name} "))
        numbers = [int(word) for word in re.findall(r"(\d+) %", line)]
        assert numbers == [round(hidden), int(opened + 0.5)], name
