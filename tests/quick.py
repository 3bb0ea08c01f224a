"""Run the tests that a change needs, for `make quick`: those that name a changed module.

A change is what differs from the last commit, or, where nothing does, the last commit. The run
ends after 40 seconds and says how many tests were left for `make check`.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALWAYS = ["tests/test_layout.py", "tests/runtime/test_plan.py", "tests/runtime/test_schedule.py"]
SECONDS = "40"


def changed_files() -> list[str]:
    """Return the paths that differ from the last commit, new files too; or that it changed."""
    now = _git("diff", "--name-only", "HEAD") + _git("ls-files", "--others", "--exclude-standard")
    return now if now else _git("diff", "--name-only", "HEAD~1", "HEAD")


def tests_of(changed: list[str]) -> list[str]:
    """Return the test files that were changed, or that import a changed module."""
    modules = {
        "sld_edge." + path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in changed
        if path.endswith(".py") and not path.startswith("tests/")
    }
    helpers = {
        path.removeprefix("tests/").removesuffix(".py").replace("/", ".")
        for path in changed
        if path.startswith(("tests/oracles/", "tests/standin/"))
    }
    chosen = []
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        name, text = str(file.relative_to(ROOT)), file.read_text(encoding="utf-8")
        if name in changed or any(_imports(text, module) for module in modules | helpers):
            chosen.append(name)
    return list(dict.fromkeys([*ALWAYS, *chosen]))


def _imports(text: str, module: str) -> bool:
    package, _, leaf = module.rpartition(".")
    return f"from {module} import" in text or f"from {package} import {leaf}" in text


def _git(*words: str) -> list[str]:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


if __name__ == "__main__":
    tests = tests_of(changed_files())
    print(f"{len(tests)} test files name a changed module")
    options = ["-q", "-x", "-m", "not slow", "--stop-after", SECONDS]
    sys.exit(pytest.main([*options, *tests]))
