"""Operations that torch's counter finds too, and bytes that can be added up by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.utils.flop_counter import FlopCounterMode

from oracles.models import (
    KINDS,
    TEXT_WIDTH,
    Kind,
    config_of,
    save_diffusers_directory,
    tiny_unet,
    weights_of,
)
from oracles.tokenizers import VOCAB_SIZE, save_tokenizer
from sld_edge.benchmarks.studies.flops import check_table, main, shared_share, work, works
from sld_edge.export import ExportSettings, export_bundle
from sld_edge.export.graphs.builder import GraphOptions
from sld_edge.export.graphs.unet import write_unet
from sld_edge.runtime.bundle import EMBEDDED, Bundle

TOKENS = 7


def graph(*nodes: onnx.NodeProto, x: Any, y: Any, **weights: Any) -> onnx.ModelProto:
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", x), ("y", y))
    ]
    tensors = [numpy_helper.from_array(np.asarray(a, np.float32), n) for n, a in weights.items()]
    made = helper.make_graph(list(nodes), "g", ends[:1], ends[1:], tensors)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)])


def node(op: str, inputs: str, output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), [output], **attributes)


def torch_count(model: Any, *shapes: tuple[int, ...]) -> int:
    """On the meta device: on the CPU torch leaves its fused attention out of the count."""
    inputs = [torch.empty(shape, device="meta") for shape in shapes]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.to("meta")(*inputs)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("attention", ["op", "decomposed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_unet_takes_the_operations_that_torch_counts(
    tmp_path: Path, kind: Kind, attention: Any
) -> None:
    model = tiny_unet(kind)
    weights = weights_of(model, tmp_path / "unet.safetensors")
    options = GraphOptions(attention=attention, shared_prefix=False)
    write_unet(config_of(model), weights, options, tmp_path / "unet.onnx")
    written = onnx.load(tmp_path / "unet.onnx", load_external_data=False)
    parameters = sum(each.numel() for each in model.parameters())
    for images, branches in ((1, 1), (2, 3)):
        count = images * branches
        sizes = {"B": images, "K*B": count, "h": 8, "w": 16, "L": TOKENS}
        ours = work(written, sizes)
        wanted = torch_count(model, (count, 4, 8, 16), (count,), (count, TOKENS, TEXT_WIDTH))
        assert ours.matrix == pytest.approx(wanted, rel=2e-3)  # one time embedding an image
        if branches == 1:
            assert ours.matrix == wanted
        constants = ours.weights - 4 * parameters  # sine frequencies, numbers
        assert 0 <= constants < 1000


def test_every_component_of_a_bundle_agrees_with_torch(tmp_path: Path) -> None:
    source = save_diffusers_directory(tmp_path / "tiny", "sd1", vocab_size=VOCAB_SIZE)
    save_tokenizer(source / "tokenizer")
    settings = ExportSettings(
        model=str(source), output=tmp_path / "bundle", precision="fp16", safety_concept="a cat"
    )
    bundle = Bundle.open(export_bundle(settings))
    rows = [line.split(" | ") for line in check_table(bundle, source, [64]).splitlines()[2:]]
    assert [row[0].strip("| ") for row in rows] == [*("text_encoder", "unet", "vae_decoder")]
    assert [row[-1].strip("| ") for row in rows] == ["1.000000"] * 3

    # What is stored in FP16 counts once, as stored; the embedding only by the rows looked up.
    alone, three = (works(bundle, 64, branches=n)["unet"] for n in (1, 3))
    assert alone.weights == three.weights
    assert 2.5 * alone.matrix < three.matrix < 3 * alone.matrix
    assert shared_share(bundle, 64) == pytest.approx(1 - three.matrix / (3 * alone.matrix))
    doubled = works(bundle, 64, branches=1, width=4)["unet"]
    assert 1.9 < doubled.weights / alone.weights <= 2
    assert 1.9 < doubled.fused / alone.fused <= 2


def test_products_and_convolutions_by_hand() -> None:
    groups = graph(
        node("Conv", "x w", "y", group=2, pads=[1, 1, 1, 1]),
        x=["B", 4, 5, 6],
        y=["B", 6, 5, 6],
        w=np.zeros((6, 2, 3, 3)),
    )
    assert work(groups, {"B": 3}).operations == {"Conv": 2 * 3 * 6 * 5 * 6 * 2 * 9}
    turned = graph(
        node("Gemm", "x w b", "y", transA=1), x=[7, 5], y=[5, 3], w=np.zeros((7, 3)), b=np.zeros(3)
    )
    assert work(turned, {}).operations == {"Gemm": 2 * 5 * 7 * 3}
    attention = graph(
        node("Attention", "x k v", "y", q_num_heads=2, kv_num_heads=2),
        x=["B", 10, 8],
        y=["B", 10, 6],
        k=np.zeros((1, 4, 8)),
        v=np.zeros((1, 4, 6)),
    )
    assert work(attention, {"B": 1}).operations == {"Attention": 2 * 10 * 4 * 8 + 2 * 10 * 4 * 6}


def test_bytes_alone_and_fused_by_hand() -> None:
    model = graph(
        node("MatMul", "x w", "a"),
        node("Reshape", "a shape", "b"),
        node("Sigmoid", "b", "c"),
        node("Mul", "b c", "y"),
        x=["B", 4],
        y=["B", 2, 4],
        w=np.zeros((4, 8)),
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1, 2, 4]), "shape"))
    for count, width in ((1, 4), (5, 4), (5, 2)):
        got = work(model, {"B": count}, width)
        assert got.weights == 32 * width + 3 * 8
        assert got.fused == count * width * (4 + 8)
        assert got.alone == count * width * ((4 + 8) + (8 + 8) + (8 + 8 + 8))
        assert got.matrix == 2 * count * 4 * 8
        assert got.other == count * (8 + 8)


def test_a_norm_counts_by_what_it_normalises() -> None:
    model = graph(
        node("LayerNormalization", "x s", "y"), x=["B", 3, 8], y=["B", 3, 8], s=np.ones(8)
    )
    assert work(model, {"B": 2}).operations == {"LayerNormalization": 8 * 2 * 3 * 8}


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([str(EMBEDDED), "--size", "64", "128", "--branches", "1", "3"]) == 0
    out = capsys.readouterr().out
    assert out.count("| unet |") == 4
    assert out.count("the shared prefix saves") == 2
    for arguments in (["--size", "65"], ["--size", "0"], ["--branches", "4"]):
        assert main([str(EMBEDDED), *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
    assert main([str(tmp_path)]) == 2
