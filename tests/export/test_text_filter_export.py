"""sld-export stores a text filter: which words, which texts, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sld_edge.export.commands.export import main
from sld_edge.runtime.bundle import EMBEDDED, Bundle
from sld_edge.runtime.text_filter import everyday_texts

CHECKPOINT = Path(__file__).parents[2] / "benchmarks" / "miniworld" / "checkpoint"


def exported(output: Path, *words: str) -> Bundle:
    asked = ["--model", str(CHECKPOINT), "--output", str(output), "--precision", "fp32", "--quiet"]
    assert main([*asked, *words]) == 0
    return Bundle.open(output)


def test_the_users_words_with_any_preset(tmp_path: Path) -> None:
    words = ("--preset", "strong", "--text-filter", "a star; heart", "--text-filter", "red")
    bundle = exported(tmp_path / "b", "--safety-concept", "skull", *words)
    stored = bundle.text_filter()
    assert stored is not None
    texts, text_filter = stored
    assert texts.concepts == text_filter.concepts == ("star", "heart", "red")
    assert (texts.guide, texts.preserve) == ("meadow", everyday_texts())
    (matrix,) = text_filter.matrices.values()
    assert matrix.shape == (96, 96)
    assert np.abs(matrix - np.eye(96)).max() > 0.01
    entry = json.loads((tmp_path / "b" / "bundle.json").read_text())["text_filter"]
    assert {Path(file["path"]).suffix for file in entry["arrays"].values()} == {".npy"}
    listed = {file.path for file in bundle.manifest.files()}
    assert {path.name for path in (tmp_path / "b").iterdir()} - {"bundle.json"} == listed


def test_the_words_of_the_concept_with_a_preset_that_has_a_filter(tmp_path: Path) -> None:
    bundle = exported(tmp_path / "b", "--safety-concept", "a skull, star")
    assert bundle.manifest.defaults.safety == "guard"
    assert bundle.manifest.text_filter is not None
    assert bundle.manifest.text_filter.concepts == ("skull", "star")


def test_none_with_a_preset_of_the_paper(tmp_path: Path) -> None:
    bundle = exported(tmp_path / "b", "--preset", "medium")
    assert bundle.manifest.text_filter is None
    assert not list((tmp_path / "b").glob("text_filter*"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--text-filter", " ; "], "text filter"),
        (["--text-filter", "meadow"], "does not take 'meadow' out of a prompt"),
        (["--text-filter", "; ".join(f"w{k}" for k in range(65))], "1 to 64"),
    ],
)
def test_words_that_cannot_be_taken_out(
    words: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "b"
    assert main(["--model", str(CHECKPOINT), "--output", str(output), "--quiet", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert says in error
    assert len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_the_miniatures(tmp_path: Path) -> None:
    """Its own texts: the same as those that its checkpoint is embedded with."""
    from sld_edge.benchmarks.miniworld.suites import SUITES, suite_entries
    from sld_edge.benchmarks.miniworld.training.embed import filter_texts

    stored = Bundle.open(EMBEDDED).text_filter()
    assert stored is not None
    assert stored[0].preserve == ("", *filter_texts())
    measured = {entry.text for name in SUITES for entry in suite_entries(name)}
    assert not measured & set(stored[0].preserve)
