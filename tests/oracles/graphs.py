"""Small graphs that tests of several engines share."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def chain(layers: int, width: int) -> onnx.ModelProto:
    """A chain of products with FP16 weights, each cast just before its product."""
    random = np.random.default_rng(0)
    weights, nodes = [], []
    for k in range(layers):
        weight = (random.standard_normal((width, width)) / width**0.5).astype(np.float16)
        weights.append(numpy_helper.from_array(weight, f"w{k}"))
        nodes.append(helper.make_node("Cast", [f"w{k}"], [f"c{k}"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("MatMul", [f"x{k}", f"c{k}"], [f"x{k + 1}"]))
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", width])
        for name in ("x0", f"x{layers}")
    ]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    opset = [helper.make_opsetid("", 23)]
    return helper.make_model(graph, opset_imports=opset, ir_version=11)
