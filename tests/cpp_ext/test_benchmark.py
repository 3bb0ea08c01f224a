from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sld_edge.benchmarks.studies import native_step
from sld_edge.cpp_ext import HAVE_NATIVE, safe_step
from sld_edge.export.graphs.guidance import write_guidance


def test_the_least_bytes_are_those_of_all_arrays() -> None:
    feeds = native_step.random_feeds(8)
    arrays = [*feeds.values(), *safe_step(feeds).values()]
    assert native_step.least_bytes(feeds) == sum(array.nbytes for array in arrays)


def test_the_graph_moves_more(tmp_path: Path) -> None:
    write_guidance(tmp_path / "guidance.onnx")
    small, large = (
        native_step.graph_bytes(tmp_path / "guidance.onnx", native_step.random_feeds(cells))
        for cells in (16, 32)
    )
    assert small > 3 * native_step.least_bytes(native_step.random_feeds(16))
    assert np.isclose(large, 4 * small, rtol=0.01)


def test_it_prints_a_row_a_size_and_count_of_threads(capsys: pytest.CaptureFixture[str]) -> None:
    code = native_step.main(["--cells", "4", "6", "--threads", "1", "--rounds", "1"])
    printed = capsys.readouterr()
    if HAVE_NATIVE:
        assert code == 0
        lines = printed.out.splitlines()
        assert [line.split("|")[1].strip() for line in lines[2:4]] == ["4x4", "6x6"]
        assert len({line.count("|") for line in lines[:4]}) == 1
    else:
        assert code == 2
        assert "see docs/native.md" in printed.err
