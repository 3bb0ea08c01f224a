"""Nodes that read weights alone go first; nothing else of the file changes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from oracles.graphs import chain
from sld_edge.engines.errors import EngineError
from sld_edge.engines.onnx_order import weights_first
from sld_edge.runtime.bundle import EMBEDDED


def without_order(model: onnx.ModelProto) -> onnx.ModelProto:
    nodes = sorted(model.graph.node, key=lambda node: node.output[0])
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def test_casts_of_weights_come_first_in_their_order() -> None:
    before = chain(3, 4)
    after = onnx.load_from_string(weights_first(before.SerializeToString()))
    names = [node.output[0] for node in after.graph.node]
    assert names == ["c0", "c1", "c2", "x1", "x2", "x3"]
    assert without_order(before) == without_order(after)


@pytest.mark.parametrize("name", ["unet", "guidance", "text_encoder", "vae_decoder"])
def test_a_real_graph_keeps_all_it_has(name: str) -> None:
    content = (EMBEDDED / f"{name}.onnx").read_bytes()
    moved = weights_first(content)
    assert len(moved) == len(content)
    assert weights_first(moved) == moved
    before, after = map(onnx.load_from_string, (content, moved))
    weights = {tensor.name for tensor in after.graph.initializer}
    reads = [weights.issuperset(node.input) for node in after.graph.node if node.input]
    assert reads == sorted(reads, reverse=True)
    assert without_order(before) == without_order(after)


def run_order(model: bytes, folder: Path, width: int) -> list[str]:
    """The operators that ONNX Runtime ran, in its order, without optimization."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    session.run(None, {"x0": np.ones((1, width), np.float32)})
    return [
        event["args"]["op_name"]
        for event in json.loads(Path(session.end_profiling()).read_text())
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    ]


def test_onnxruntime_then_casts_each_weight_just_before_its_use(tmp_path: Path) -> None:
    model = chain(6, 8).SerializeToString()
    assert run_order(model, tmp_path, 8)[:3] == ["Cast"] * 3  # long before they are used
    assert run_order(weights_first(model), tmp_path, 8) == ["Cast", "MatMul"] * 6


@pytest.mark.parametrize("damage", ["garbage", "cut short"])
def test_what_is_no_graph_is_refused(damage: str) -> None:
    content = chain(2, 4).SerializeToString()
    bad = b"\xff" * 40 if damage == "garbage" else content[:-7]
    with pytest.raises(EngineError, match="not a whole ONNX file"):
        weights_first(bad)
