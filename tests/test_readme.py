"""What the README says exists, and its Python runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

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


def test_commands_it_shows_take_the_options_it_shows() -> None:
    from sld_edge.runtime.cli import parser as run_parser

    known = run_parser().format_help()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for line in re.findall(r"^sld-run .*", readme, re.MULTILINE):
        for option in re.findall(r"--[a-z-]+", line):
            assert option in known, option
