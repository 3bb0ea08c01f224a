"""The shallow UNet: the layers after `deep`, and what they need besides, cut out of the whole one.

It is nodes and weights of the UNet as they are, so with the UNet's own `deep` it gives the very
same noise_pred. Its weights stay in the UNet's file.
"""

from __future__ import annotations

from pathlib import Path

import onnx

DEEP = "deep"  # output of the UNet, input here


def write_shallow_unet(unet: Path, path: Path) -> None:
    """Write the shallow part of the UNet at `unet`, which has an output `deep`, beside it.

    Inputs are the UNet's and `deep` [K*B,D,h,w], the output is `noise_pred` [K*B,4,h,w].
    Source: DeepCache, arXiv 2312.00858, section 3.3, with its outermost skip branch.
    """
    if unet.parent != path.parent:
        raise ValueError("the weights lie beside the UNet")
    model = onnx.load(str(unet), load_external_data=False)
    graph = model.graph
    nodes, names = _needed(graph, "noise_pred")
    deep = [item for item in graph.output if item.name == DEEP]
    kept = onnx.helper.make_graph(
        nodes,
        path.stem,
        [*graph.input, *deep],
        [item for item in graph.output if item.name != DEEP],
        [tensor for tensor in graph.initializer if tensor.name in names],
    )
    model.graph.CopyFrom(kept)
    path.write_bytes(model.SerializeToString(deterministic=True))


def _needed(graph: onnx.GraphProto, output: str) -> tuple[list[onnx.NodeProto], set[str]]:
    """Return the nodes that `output` depends on, in their order, where `deep` is given."""
    names = {output}
    nodes = []
    for node in reversed(graph.node):  # they are sorted: who reads a name comes after its maker
        if names.intersection(node.output) - {DEEP}:
            nodes.append(node)
            names.update(node.input)
    return nodes[::-1], names
