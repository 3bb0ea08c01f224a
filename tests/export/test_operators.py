"""Classic TensorRT 10.3 (JetPack 6) documents every operator, type and opset we send it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from oracles.models import (
    KINDS,
    Kind,
    config_of,
    tiny_text_encoder,
    tiny_unet,
    tiny_vae,
    weights_of,
)
from sld_edge.export.graphs.builder import GraphOptions
from sld_edge.export.graphs.clip import write_text_encoder
from sld_edge.export.graphs.decompose import decomposed_graph, inferred_tensors
from sld_edge.export.graphs.guidance import write_guidance
from sld_edge.export.graphs.unet import write_unet
from sld_edge.export.graphs.vae import write_vae_decoder
from sld_edge.runtime.bundle import EMBEDDED, Bundle

TABLE: dict[str, Any] = json.loads(
    Path(__file__).with_name("tensorrt_10_3_operators.json").read_text()
)
COMPONENTS = ("text_encoder", "unet", "vae_decoder", "guidance")


def complaints(path: Path) -> set[str]:
    """Return what 10.3 does not document of a graph, in words."""
    model = onnx.load(str(path), load_external_data=False)
    types = {
        name: np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
        for name, tensor in inferred_tensors(model).items()
        if tensor.elem_type
    }
    types |= {
        tensor.name: np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).name
        for tensor in model.graph.initializer
    }
    found = set(_of_versions(model))
    constants = {tensor.name for tensor in model.graph.initializer}
    boundary = {item.name for item in (*model.graph.input, *model.graph.output)}
    for node in model.graph.node:
        found |= set(_of_node(node, types, constants, boundary))
    return found


def _of_versions(model: onnx.ModelProto) -> Iterator[str]:
    least, most = TABLE["opsets"]
    for item in model.opset_import:
        if item.domain not in ("", "ai.onnx") or not least <= item.version <= most:
            yield f"opset {item.domain} {item.version}"
    if model.ir_version > TABLE["ir_version"]:
        yield f"IR version {model.ir_version}"


def _of_node(
    node: onnx.NodeProto, types: dict[str, str], constants: set[str], boundary: set[str]
) -> Iterator[str]:
    if node.op_type not in TABLE["operators"]:
        yield f"operator {node.op_type}"
        return
    # The sizes and axes that an operator takes besides are not what its types are about.
    data = [*node.input, *node.output] if node.op_type == "Cast" else [*node.input[:1]]
    if node.op_type == "Where":
        data = list(node.input[1:])
    for name in data:
        if name not in types:
            yield f"{node.op_type} of an unknown type"
        elif types[name] not in TABLE["operators"][node.op_type]:
            yield f"{node.op_type} of {types[name]}"
    for name in (*node.input, *node.output):
        if types.get(name) in TABLE["boundary_only_types"] and name not in boundary:
            yield f"{types[name]} inside"
    if node.op_type in TABLE["constant_axes"] and not set(node.input[1:]) <= constants:
        yield f"{node.op_type} over computed axes"
    if node.op_type == "Resize":
        for attribute in node.attribute:
            value = helper.get_attribute_value(attribute)
            if value.decode() not in TABLE["resize"][attribute.name]:
                yield f"Resize with {attribute.name}"


def written(folder: Path, kind: Kind, options: GraphOptions) -> dict[str, Path]:
    """Write all graphs of a tiny model."""
    unet, vae = tiny_unet(kind), tiny_vae()
    text = tiny_text_encoder("gelu" if kind == "sd2" else "quick_gelu")
    models = {
        "text_encoder": (write_text_encoder, text),
        "unet": (write_unet, unet),
        "vae_decoder": (write_vae_decoder, vae),
    }
    paths = {name: folder / f"{name}.onnx" for name in COMPONENTS}
    for name, (write, model) in models.items():
        weights = weights_of(model, folder / f"{name}.safetensors", name=name)
        write(config_of(model), weights, options, paths[name])
    write_guidance(paths["guidance"])
    return paths


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_what_the_builder_decomposes_is_documented(
    kind: Kind, precision: Any, tmp_path: Path
) -> None:
    paths = written(tmp_path, kind, GraphOptions(precision=precision, attention="decomposed"))
    assert [(name, complaints(path)) for name, path in paths.items() if complaints(path)] == []


@pytest.mark.parametrize("component", Bundle.open().manifest.components)
def test_what_is_decomposed_from_the_miniature_is_documented(
    component: str, tmp_path: Path
) -> None:
    target = tmp_path / f"{component}.onnx"
    decomposed_graph(EMBEDDED / target.name, target)
    assert complaints(target) == set()


# --- a check of the check -----------------------------------------------------------------------


def test_the_other_form_is_not_documented(tmp_path: Path) -> None:
    paths = written(tmp_path, "sd2", GraphOptions())
    unet = complaints(paths["unet"])
    assert {"operator Attention", "opset  23", "IR version 11"} <= unet
    assert complaints(paths["vae_decoder"]) & {"operator Attention"}


value = partial(helper.make_tensor_value_info, shape=["N", 4, 4, 4])
FLAWS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "Mul of uint8": ("Mul", ["bytes", "bytes"], {}),
    "Sqrt of int64": ("Sqrt", ["whole"], {}),
    "ReduceSum over computed axes": ("ReduceSum", ["x", "axes"], {}),
    "Resize with mode": ("Resize", ["x", "", "scales"], {"mode": "cubic"}),
    "operator Det": ("Det", ["x"], {}),
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_flaw_is_found(flaw: str, tmp_path: Path) -> None:
    op, inputs, attributes = FLAWS[flaw]
    graph = helper.make_graph(
        [helper.make_node(op, inputs, ["y"], **attributes)],
        "g",
        [
            value("x", TensorProto.FLOAT),
            value("bytes", TensorProto.UINT8),
            value("whole", TensorProto.INT64),
            helper.make_tensor_value_info("axes", TensorProto.INT64, [1]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [helper.make_tensor("scales", TensorProto.FLOAT, [4], [1, 1, 2, 2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, tmp_path / "g.onnx")
    assert complaints(tmp_path / "g.onnx") == {flaw}


def test_bytes_inside_are_found(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["x"], ["b"], to=TensorProto.UINT8),
            helper.make_node("Cast", ["b"], ["y"], to=TensorProto.FLOAT),
        ],
        "g",
        [value("x", TensorProto.FLOAT)],
        [value("y", TensorProto.FLOAT)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, tmp_path / "g.onnx")
    assert complaints(tmp_path / "g.onnx") == {"uint8 inside"}
