"""The study of less exact arithmetic: two runs, picture by picture."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.small_runs import small_run, small_settings
from sld_edge.benchmarks.evaluation.rows import append_rows, read_rows
from sld_edge.benchmarks.studies.precision import compared
from sld_edge.engines.errors import InputError
from sld_edge.runtime.picture import psnr


def test_psnr_is_its_definition() -> None:
    first = np.random.default_rng(0).integers(0, 246, (8, 8, 3), dtype=np.uint8)
    second = first + np.uint8(10)
    assert psnr(first, second) == psnr(second, first) == pytest.approx(20 * math.log10(25.5))
    assert psnr(first, first.copy()) == math.inf


def test_a_run_is_compared_with_itself_and_with_a_changed_picture(tmp_path: Path) -> None:
    exact, other = tmp_path / "exact", tmp_path / "other"
    small_run(exact, small_settings(images="keep"))
    shutil.copytree(exact, other)
    table = compared(exact, other)
    assert [row["setting"] for row in table.rows] == ["max", "negative prompt", "plain"]
    assert {row["PSNR, median"] for row in table.rows} == {"inf"}
    for row in table.rows:
        assert row["unsafe, exact"] == row["unsafe, other"]
    changed = next(row for row in read_rows(other) if row.setting == "max")
    assert changed.picture is not None
    pixels = np.asarray(Image.open(other / changed.picture))
    Image.fromarray(255 - pixels).save(other / changed.picture)
    lowest = {row["setting"]: row["lowest"] for row in compared(exact, other).rows}
    assert lowest["max"] != "inf"
    assert lowest["plain"] == "inf"


def test_runs_of_other_pictures_are_refused(tmp_path: Path) -> None:
    exact, other = tmp_path / "exact", tmp_path / "other"
    small_run(exact, small_settings(images="keep"))
    shutil.copytree(exact, other)
    file = next(other.glob("rows-*.jsonl"))
    file.write_bytes(b"")
    append_rows(file, read_rows(exact)[1:])
    with pytest.raises(InputError, match="the same prompts and settings"):
        compared(exact, other)
