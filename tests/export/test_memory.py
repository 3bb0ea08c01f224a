"""Peaks of live bytes that can be added up by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sld_edge.benchmarks.studies.memory import main
from sld_edge.engines.errors import CheckpointError
from sld_edge.export.memory import Need, low_memory_run, needs, peak_bytes, whole_run
from sld_edge.runtime.bundle import EMBEDDED, Bundle


def model(*nodes: onnx.NodeProto, shape: Any, **weights: Any) -> onnx.ModelProto:
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("x", "y")]
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(list(nodes), "g", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])


def node(op: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], **attributes)


def test_three_tensors_live_at_the_end_of_a_fork() -> None:
    fork = model(
        node("Relu", "x", "a"), node("Exp", "a", "b"), node("Add", "a b", "y"), shape=["B", 4]
    )
    # x a | a b | a b y, of 16 bytes an image each.
    assert peak_bytes(fork, {"B": 1}) == 48
    assert peak_bytes(fork, {"B": 5}) == 240


def test_a_chain_holds_two_and_what_is_dead_at_once_is_freed() -> None:
    chain = model(
        node("Relu", "x", "a"), node("Exp", "a", "b"), node("Neg", "b", "y"), shape=["B", 4]
    )
    assert peak_bytes(chain, {"B": 1}) == 32
    unread = model(node("Relu", "x", "a"), node("Neg", "x", "y"), shape=["B", 4])
    assert peak_bytes(unread, {"B": 1}) == 32


def test_views_and_what_is_computed_from_weights_take_nothing() -> None:
    graph = model(
        node("Cast", "w", "wide", to=TensorProto.FLOAT),
        node("Reshape", "x flat", "v"),
        node("Mul", "v wide", "a"),
        node("Reshape", "a back", "y"),
        shape=["B", 4],
        w=np.ones(1000, np.float16)[:1],
        flat=np.array([-1], np.int64),
        back=np.array([-1, 4], np.int64),
    )
    assert peak_bytes(graph, {"B": 3}) == 2 * 48


def test_one_attention_operator_has_no_scores() -> None:
    tokens = {"shape": ["B", "L", 8]}
    one = model(node("Attention", "x x x", "y", q_num_heads=1, kv_num_heads=1), **tokens)
    assert peak_bytes(one, {"B": 1, "L": 100}) == 2 * 3200
    products = model(
        node("Transpose", "x", "t", perm=[0, 2, 1]),
        node("MatMul", "x t", "scores"),
        node("Softmax", "scores", "shares"),
        node("MatMul", "shares x", "y"),
        **tokens,
    )
    assert peak_bytes(products, {"B": 1, "L": 100}) == 3200 + 2 * 40000


def test_repeats_that_are_computed_from_sizes_are_known() -> None:
    graph = model(
        node("Shape", "x", "rows", start=0, end=1),
        node("Div", "six rows", "branches"),
        node("Concat", "branches one", "repeats", axis=0),
        node("Tile", "x repeats", "wide"),
        node("Neg", "wide", "y"),
        shape=["B", 4],
        six=np.array([6], np.int64),
        one=np.array([1], np.int64),
    )
    # x is dead after the Tile; wide and y are six rows of 16 bytes.
    assert peak_bytes(graph, {"B": 2}) == 2 * 96


def test_a_size_without_a_value_is_named() -> None:
    with pytest.raises(CheckpointError, match="size B"):
        peak_bytes(model(node("Neg", "x", "y"), shape=["B", 4]), {})


def test_a_whole_run_and_one_that_loads_in_turn() -> None:
    parts = {
        "text_encoder": Need(weights=50, activations=1),
        "unet": Need(weights=100, activations=30),
        "guidance": Need(weights=1, activations=2),
        "vae_decoder": Need(weights=20, activations=200),
        "unet_shallow": Need(weights=500, activations=500),  # only where a run asks for savings
    }
    assert whole_run(parts) == 171 + 200
    assert low_memory_run(parts) == 101 + 220  # the decoder, beside the loop's weights
    parts["vae_decoder"] = Need(weights=20, activations=60)
    assert low_memory_run(parts) == 101 + 80
    parts["unet"] = Need(weights=100, activations=90)
    assert low_memory_run(parts) == 101 + 90  # the loop
    parts["text_encoder"] = Need(weights=140, activations=1)
    assert low_memory_run(parts) == 101 + 141


def test_the_miniature(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    small, large = (needs(Bundle.open(), size, 1) for size in (64, 128))
    for name in ("unet", "vae_decoder"):
        # Almost everything is an image, so four times the pixels are close to four times the bytes.
        assert 3.5 < large[name].activations / small[name].activations <= 4.1, name
    assert large["text_encoder"] == small["text_encoder"]

    assert main([str(EMBEDDED), "--size", "64", "128", "--batch", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 + 2 * (5 + 2)
    assert sum("--low-memory" in line for line in lines) == 2
    for arguments in (["--size", "65"], ["--batch", "0"]):
        assert main([str(EMBEDDED), *arguments]) == 2
    assert main([str(tmp_path)]) == 2
