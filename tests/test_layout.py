"""The folders are one package, and its public face is what it says."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ["engines", "runtime", "export", "benchmarks"]


@pytest.mark.parametrize("name", PACKAGES)
def test_each_folder_is_linked_into_the_package(name: str) -> None:
    link = ROOT / ".namespace" / "sld_edge" / name
    assert link.is_symlink(), "not a link: run `git config core.symlinks true`, check out again"
    assert link.resolve() == (ROOT / name).resolve()
    assert (ROOT / name / "py.typed").exists()


def test_the_namespace_has_no_init() -> None:
    assert not (ROOT / ".namespace" / "sld_edge" / "__init__.py").exists()


@pytest.mark.parametrize("name", ["runtime", "export"])
def test_everything_in_all_is_there_and_documented(name: str) -> None:
    module = importlib.import_module(f"sld_edge.{name}")
    for entry in module.__all__:
        value = getattr(module, entry)
        if callable(value):
            assert value.__doc__, entry
