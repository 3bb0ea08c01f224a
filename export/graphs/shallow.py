"""The shallow UNet: the layers after `deep`, and all other nodes that they need.

It has the UNet's nodes and weights unchanged, so from the UNet's `deep` it computes the same
noise_pred. Its weights stay in the UNet's file.
"""

from __future__ import annotations

from pathlib import Path

import onnx

DEEP = "deep"  # output of the UNet, input here


def write_shallow_unet(unet: Path, path: Path) -> None:
    """Write the shallow part of the UNet at `unet`, in the same folder.

    Inputs are the UNet's inputs and its output `deep` [K*B,D,h,w]; the output is `noise_pred`
    [K*B,4,h,w].
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
    """Return the nodes that compute `output` from `deep`, in order, and the names they read."""
    names = {output}
    nodes = []
    for node in reversed(graph.node):  # the maker of a name comes before its readers
        if names.intersection(node.output) - {DEEP}:
            nodes.append(node)
            names.update(node.input)
    return nodes[::-1], names
