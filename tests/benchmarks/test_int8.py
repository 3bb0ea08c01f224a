"""Quantized variants of a tiny UNet: made, run, and judged by their error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from oracles.models import save_diffusers_directory
from oracles.tokenizers import VOCAB_SIZE, save_tokenizer
from sld_edge.benchmarks.int8 import (
    BRANCHES,
    compared,
    main,
    measure,
    random_feeds,
    relative_error,
)
from sld_edge.export import ExportSettings, export_bundle
from sld_edge.runtime.bundle import EMBEDDED, Bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    root = tmp_path_factory.mktemp("tiny")
    save_diffusers_directory(root / "model", "sd1", vocab_size=VOCAB_SIZE)
    save_tokenizer(root / "model" / "tokenizer")
    settings = ExportSettings(
        model=str(root / "model"),
        output=root / "bundle",
        precision="fp32",
        safety_concept="a cat",
    )
    return Bundle.open(export_bundle(settings))


class Scaled:
    """An engine whose prediction is the latents times a number."""

    def __init__(self, factor: float) -> None:
        self.factor, self.calls = np.float32(factor), 0

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.calls += 1
        return {"noise_pred": feeds["latents"] * self.factor}


def test_the_error_is_relative_to_the_reference() -> None:
    got, wanted = (np.array([3, last], np.float32) for last in (0, 4))
    assert relative_error(got, wanted) == pytest.approx(0.8)


def test_each_round_runs_both_and_the_first_is_not_timed(bundle: Bundle) -> None:
    feeds = list(random_feeds(bundle.manifest, 64, 3, seed=0))
    assert [one["context"].shape[0] for one in feeds] == [BRANCHES] * 3
    assert [float(one["timestep"][0]) for one in feeds] == [981, 741, 501]
    plain, other = Scaled(1), Scaled(1.25)
    errors, ratios = compared(plain, other, feeds, 4)  # type: ignore[arg-type]  # not whole engines
    assert errors == pytest.approx([0.25] * 5)
    assert len(ratios) == 4
    assert plain.calls == other.calls == 5


def test_fewer_bits_are_a_larger_error(bundle: Bundle, tmp_path: Path) -> None:
    text = measure(bundle, tmp_path / "out", size=64, samples=2, rounds=1)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[2:]]
    static, eight, four = (float(row[3].split("%")[0]) for row in rows)
    assert 0.01 < eight < four < 30  # FP32 itself is at 0.0003 %
    assert eight < static < 30
    assert [row[4] for row in rows][2] == "no"
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--output", str(tmp_path / "out")]
    assert main([str(EMBEDDED), *out]) == 2
    assert "stored as fp16" in capsys.readouterr().err
    for arguments in (["--size", "65"], ["--rounds", "0"], ["--samples", "0"]):
        assert main([str(EMBEDDED), *out, *arguments]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert main([str(tmp_path), *out]) == 2
    assert not (tmp_path / "out").exists()
