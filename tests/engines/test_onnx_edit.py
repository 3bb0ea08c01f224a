"""Of an ONNX file only what is meant changes, and ONNX Runtime then computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from oracles.graphs import chain
from sld_edge.engines.errors import EngineError
from sld_edge.engines.onnxruntime.edit import flash_attention, weights_first
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
    with pytest.raises(EngineError, match="not a whole ONNX file"):
        flash_attention(bad)


def attention(
    *, grouped: bool = False, masked: bool = False, present: bool = False, **attributes: Any
) -> onnx.ModelProto:
    """Attention of two heads with 6 numbers each, in the form that the exporter writes."""
    keys: list[str | int] = ["B", "L", 6 if grouped else 12]
    shapes: dict[str, list[str | int]] = {"q": ["B", "S", 12], "k": keys, "v": keys}
    if masked:
        shapes["mask"] = ["S", "L"]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    ]
    node = helper.make_node(
        "Attention",
        [*shapes],
        ["out", "present_key", "present_value"] if present else ["out"],
        name="a name",
        q_num_heads=2,
        kv_num_heads=1 if grouped else 2,
        **attributes,
    )
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["B", "S", 12])]
    graph = helper.make_graph([node], "attention", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


@pytest.mark.parametrize("attributes", [{}, {"scale": 0.31}, {"is_causal": 0, "softcap": 0.0}])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (40, 7), (1, 9)])
def test_attention_becomes_onnxruntimes_own_and_gives_the_same(
    attributes: dict[str, Any], queries: int, keys: int
) -> None:
    model = attention(**attributes)
    edited = flash_attention(model.SerializeToString())
    after = onnx.load_from_string(edited)
    (node,) = after.graph.node
    assert (node.domain, node.op_type, node.name) == (
        "com.microsoft",
        "MultiHeadAttention",
        "a name",
    )
    assert [(opset.domain, opset.version) for opset in after.opset_import] == [
        ("", 23),
        ("com.microsoft", 1),
    ]
    rng = np.random.default_rng(keys)
    feeds = {
        name: rng.standard_normal((2, rows, 12), np.float32)
        for name, rows in (("q", queries), ("k", keys), ("v", keys))
    }
    (expected,) = ReferenceEvaluator(model).run(None, feeds)
    assert isinstance(expected, np.ndarray)
    session = onnxruntime.InferenceSession(edited, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, feeds)[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "other",
    [
        {"is_causal": 1},
        {"softcap": 2.0},
        {"masked": True},
        {"grouped": True},
        {"present": True},
    ],
)
def test_other_attention_stays(other: dict[str, Any]) -> None:
    content = attention(**other).SerializeToString()
    assert flash_attention(content) == content


def test_of_a_real_graph_only_attention_changes() -> None:
    before = onnx.load(EMBEDDED / "unet.onnx", load_external_data=False)
    after = onnx.load_from_string(flash_attention(before.SerializeToString()))
    pairs = list(zip(before.graph.node, after.graph.node, strict=True))
    changed = [(a, b) for a, b in pairs if a != b]
    assert {(a.op_type, b.op_type) for a, b in changed} == {("Attention", "MultiHeadAttention")}
    assert not any(node.op_type == "Attention" for node in after.graph.node)
    for a, b in changed:
        assert (a.input, a.output) == (b.input, b.output)
    del before.graph.node[:], after.graph.node[:]
    assert before.graph == after.graph
