"""Graphs prepared for OpenVINO, in its own format.

A graph's FP16 weights stay FP16 on disk and stay mapped; OpenVINO takes them from there into the
layout and precision of its kernels. All arithmetic of a prepared graph is FP32, which OpenVINO may
compute in BF16 where that was asked for.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from sld_edge.engines.errors import EngineError, one_line
from sld_edge.engines.openvino.api import openvino, read_model
from sld_edge.engines.openvino.engine import OpenVinoEngine
from sld_edge.engines.openvino.target import Target
from sld_edge.engines.prepared import Recipe

_LAYOUT = 2  # raise when the preparation changes
_GRAPH, _WEIGHTS = "model.xml", "model.bin"


def recipe(target: Target, *, fixed: bool, rounded: bool = False) -> Recipe[OpenVinoEngine]:
    """Return how OpenVINO prepares a graph.

    Args:
        target: device and precision; they do not change the prepared graph.
        fixed: compile the graph for the sizes of its inputs; see `OpenVinoEngine`.
        rounded: round FP32 weights to FP16, which halves the file.
    """
    return Recipe(
        facts=("openvino", _LAYOUT, rounded, openvino().__version__),
        files=(_GRAPH, _WEIGHTS),
        write=partial(_write, rounded=rounded),
        load=lambda path, lock: OpenVinoEngine(path, target, fixed=fixed, lock=lock),
        load_source=partial(_unprepared, target=target, fixed=fixed),
    )


def _unprepared(path: Path, *, target: Target, fixed: bool) -> OpenVinoEngine:
    """Load a graph that could not be prepared.

    Raises:
        EngineError: it would lose the FP32 outputs that safety needs in BF16; or OpenVINO cannot
            load it.
    """
    if target.precision == "bf16":
        raise EngineError(
            f"bf16 needs prepared graphs, and {path.name} could not be prepared",
            do="give the cache room (sld-run --cache, SLD_EDGE_CACHE), or leave bf16 out",
        )
    return OpenVinoEngine(path, target, fixed=fixed)


def _write(path: Path, part: Path, *, rounded: bool) -> None:
    """Write a graph in OpenVINO's format.

    Raises:
        EngineError: OpenVINO cannot read the graph.
        OSError: the disk is full.
    """
    model = read_model(path)
    graph = part / _GRAPH
    try:
        _widen(model)
        openvino().save_model(model, graph, compress_to_fp16=rounded)
        tree = ElementTree.parse(graph)
    except Exception as error:  # OpenVINO's errors share no base class
        raise EngineError(f"OpenVINO cannot write {path}", got=one_line(error)) from error
    _keep_compressed(tree.getroot())
    _keep_outputs_exact(tree.getroot())
    tree.write(graph, encoding="utf-8", xml_declaration=True)


def _widen(model: Any) -> None:
    """Turn FP16 arithmetic into FP32 arithmetic on the same weights, which stay FP16.

    A processor has no FP16 arithmetic, and OpenVINO would keep a second copy of the weights.
    """
    half = openvino().Type.f16
    convert = openvino().opset13.convert
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind == "Convert" and node.get_output_element_type(0) == half:
            node.output(0).replace(node.input_value(0))
        elif kind == "Constant" and node.get_output_element_type(0) == half:
            consumers = [
                each
                for each in node.output(0).get_target_inputs()
                if each.get_node().get_type_name() != "Convert"
            ]
            wide = convert(node, "f32").output(0) if consumers else None
            for each in consumers:
                each.replace_source_output(wide)
    model.validate_nodes_and_infer_types()


def _keep_compressed(net: ElementTree.Element) -> None:
    """Mark the conversions of FP16 weights, so that OpenVINO does not compute them beforehand."""
    half = {
        layer.get("id")
        for layer in net.iter("layer")
        if layer.get("type") == "Const" and layer.find("data[@element_type='f16']") is not None
    }
    fed = {edge.get("to-layer") for edge in net.iter("edge") if edge.get("from-layer") in half}
    for layer in net.iter("layer"):
        if layer.get("type") == "Convert" and layer.get("id") in fed:
            _mark(layer, "decompression")


def _keep_outputs_exact(net: ElementTree.Element) -> None:
    """Mark a convolution that makes an output, and its bias: they stay FP32 in any precision.

    Safe Latent Diffusion measures the difference between two branches. Rounded to BF16, their
    predictions are equal in a sixth of the places.
    """
    layers = {layer.get("id"): layer for layer in net.iter("layer")}
    inputs = {
        edge.get("to-layer"): layers[edge.get("from-layer")]
        for edge in net.iter("edge")
        if edge.get("to-port") == "0"
    }
    for result in net.iter("layer"):
        if result.get("type") == "Result":
            bias = inputs[result.get("id")]
            while bias.get("type") == "Convert":
                bias = inputs[bias.get("id")]
            product = inputs.get(bias.get("id"), bias)
            if (bias.get("type"), product.get("type")) == ("Add", "Convolution"):
                _mark(bias, "precise")
                _mark(product, "precise")


def _mark(layer: ElementTree.Element, name: str) -> None:
    """Give a layer an attribute, if it does not have it."""
    info = layer.find("rt_info")
    if info is None:
        info = ElementTree.Element("rt_info")
        layer.insert(1, info)  # after `data`
    if info.find(f"attribute[@name='{name}']") is None:
        ElementTree.SubElement(info, "attribute", name=name, version="0")
