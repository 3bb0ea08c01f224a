"""The decomposed form of a bundle's graph, for TensorRT before 10.13 and for FP32 plans.

TensorRT reads the operator Attention only from 10.13 on, and only in FP16. The decomposed form is
the builder's with attention "decomposed". The functions of `layers` write the nodes that differ;
all other nodes are copied, and the weights stay in their file.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import onnx

from sld_edge.engines.errors import CheckpointError, OutputError
from sld_edge.export.graphs.builder import GraphBuilder, GraphOptions, Precision, Value
from sld_edge.export.graphs.layers import attention, decomposed_group_norm, gelu

_OPTIONS = GraphOptions(attention="decomposed")
_OPSETS = (_OPTIONS.opset, GraphOptions(attention="op").opset)
_PRECISIONS: dict[int, Precision] = {
    onnx.TensorProto.FLOAT: "fp32",
    onnx.TensorProto.FLOAT16: "fp16",
}
_FORWARD = "export the bundle with --attention decomposed"


def decomposed_graph(source: Path, target: Path) -> Path | None:
    """Write the graph at `source` to `target` in opset 20, its weights unchanged.

    The weights' file is linked to `target` + ".data", so it takes no space (where links are not
    possible, it is copied). A file that the graph shares with another graph keeps its name.
    Arithmetic and storage keep their precision.

    Args:
        source: a graph of a bundle, of opset 23; a graph of opset 20 does not change.
        target: another path; an existing file is replaced.

    Returns:
        The new weights' file, if any.

    Raises:
        CheckpointError: a graph with nodes that the builder does not write.
        OutputError: `target` cannot be written.
    """
    if source.resolve() == target.resolve():
        raise ValueError("source and target are one file")
    model = onnx.load(str(source), load_external_data=False)
    graph = _Graph(source, model)
    weights = graph.move_data(target.name + ".data")
    data = None
    try:
        if weights is not None:
            old, new = (
                side.with_name(name) for side, name in zip((source, target), weights, strict=True)
            )
            if old != new:
                data = new
                _link(old, new)
        graph.write(target)
    except BaseException as error:
        if data is not None:
            data.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise OutputError(
            f"cannot write {target}", got=error.strerror, do="make room, or choose another place"
        ) from error
    return data


def inferred_tensors(model: onnx.ModelProto) -> dict[str, onnx.TypeProto.Tensor]:
    """Return the type and shape of every value that shape inference knows, by name."""
    scratch = onnx.ModelProto()
    scratch.CopyFrom(model)
    for node in scratch.graph.node:
        if node.op_type == "GroupNormalization":  # shape inference stops only here
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
    inferred = onnx.shape_inference.infer_shapes(scratch, data_prop=True).graph
    return {
        item.name: item.type.tensor_type
        for owner in (inferred.input, inferred.value_info, inferred.output)
        for item in owner
    }


class _Graph:
    """The source graph and the types and shapes of its values."""

    def __init__(self, path: Path, model: onnx.ModelProto) -> None:
        self.path, self.graph = path, model.graph
        domains = {item.domain or "ai.onnx": item.version for item in model.opset_import}
        self.opset = domains.get("ai.onnx", 0)
        if len(domains) > 1 or self.opset not in _OPSETS or model.functions:
            versions = ", ".join(f"{domain} {version}" for domain, version in domains.items())
            raise self.unknown(
                "operators", got=versions, expected=" or ".join(f"opset {n}" for n in _OPSETS)
            )
        self.tensors = inferred_tensors(model)
        self.makers = {name: node for node in self.graph.node for name in node.output}
        self.writers = {
            "Attention": self._attention,
            "GroupNormalization": self._group_norm,
            "Gelu": self._gelu,
        }
        self.weights = {tensor.name: tensor for tensor in self.graph.initializer}

    def move_data(self, location: str) -> tuple[str, str] | None:
        """Rename the weights' file in the graph; return its old and new name, None without a file.

        A file that another graph owns keeps its name: it is beside that graph, too.
        """
        entries = [
            entry
            for tensor in self.graph.initializer
            if tensor.data_location == tensor.EXTERNAL
            for entry in tensor.external_data
            if entry.key == "location"
        ]
        names = {entry.value for entry in entries}
        if not names:
            return None
        old = names.pop()
        if names or not self.path.with_name(Path(old).name).is_file():
            raise self.unknown(f"weights in {', '.join((old, *names))}")
        new = location if old == f"{self.path.name}.data" else old
        for entry in entries:
            entry.value = new
        return old, new

    def write(self, target: Path) -> None:
        options = GraphOptions(attention="decomposed", precision=self._precision())
        with GraphBuilder(target, options, inline=True) as b:
            b.adopt(self.graph)
            for node in self.graph.node:
                if node.op_type in self.writers:
                    y = self.writers[node.op_type](b, node)
                    b.rename(y, node.output[0])
                else:
                    self._check(node)
                    b.copy(node)

    def unknown(self, what: str, **facts: Any) -> CheckpointError:
        return CheckpointError(
            f"{self.path.name}: {what} cannot be decomposed", do=_FORWARD, **facts
        )

    def _attention(self, b: GraphBuilder, node: onnx.NodeProto) -> Value:
        attributes = self._attributes(node, "q_num_heads", "kv_num_heads", "scale", "is_causal")
        if len(node.input) != 3 or len(node.output) != 1:
            raise self.unknown(f"the inputs of {node.name}", got=", ".join(node.input))
        q, k, v = (Value(name, 3) for name in node.input)
        queries, keys, values = (self._sizes(name) for name in node.input)
        # Shape inference knows no sizes of repeated queries, so the sizes of the keys count.
        if not (len(keys) == 3 and keys[2] > 0 and keys[2] == values[2]):
            raise self.unknown(f"{node.name} of keys {keys} and values {values}")
        length, channels = keys[1:]
        heads = attributes.get("q_num_heads", 0)
        if heads < 1 or channels % heads:
            raise self.unknown(f"{node.name} of {channels} channels", got=f"{heads} heads")
        plain = {
            "kv_num_heads": attributes.get("kv_num_heads") == heads,
            "scale": math.isclose(
                attributes.get("scale", 0), (channels / heads) ** -0.5, rel_tol=1e-6
            ),
            "is_causal": attributes.get("is_causal", 0) in (0, 1),
        }
        for name, is_plain in plain.items():
            if not is_plain:
                raise self.unknown(f"{name} of {node.name}", got=attributes.get(name))
        causal = attributes.get("is_causal", 0) == 1
        if causal and (length < 1 or queries[1:2] != [length]):
            raise self.unknown(f"causal {node.name} of any length")
        return attention(
            b,
            q,
            k,
            v,
            heads=heads,
            channels=channels,
            name=node.output[0],
            causal_length=length if causal else None,
        )

    def _group_norm(self, b: GraphBuilder, node: onnx.NodeProto) -> Value:
        attributes = self._attributes(node, "num_groups", "epsilon")
        if self.opset < 21:  # there scale and bias have a number per group
            raise self.unknown(f"{node.name} of opset {self.opset}")
        for name in node.input[1:]:
            self._reshape_to_column(name, node)
        x, scale, bias = (
            Value(name, rank) for name, rank in zip(node.input, (4, 3, 3), strict=True)
        )
        if len(self._sizes(node.input[0])) != 4:
            raise self.unknown(f"{node.name}, whose input is no image,")
        groups, eps = attributes["num_groups"], attributes.get("epsilon", 1e-5)
        return decomposed_group_norm(b, x, scale, bias, groups=groups, eps=eps, name=node.output[0])

    def _gelu(self, b: GraphBuilder, node: onnx.NodeProto) -> Value:
        if self._attributes(node, "approximate").get("approximate", b"none") != b"none":
            raise self.unknown(f"the approximation of {node.name}")
        return gelu(b, Value(node.input[0], 3), node.output[0])

    def _reshape_to_column(self, name: str, node: onnx.NodeProto) -> None:
        """Give a weight [C], cast or not, the shape [C,1,1]; its bytes do not change."""
        reader, maker = node, self.makers.get(name)
        if maker is not None and maker.op_type == "Cast":
            name, reader = maker.input[0], maker
            self._require_one_reader(maker.output[0], node)
        if name not in self.weights or len(self.weights[name].dims) != 1:
            raise self.unknown(f"{node.name}, whose {name} is no weight,")
        self._require_one_reader(name, reader)
        self.weights[name].dims.extend((1, 1))

    def _require_one_reader(self, name: str, reader: onnx.NodeProto) -> None:
        readers = [each for each in self.graph.node if name in each.input]
        if len(readers) != 1 or list(reader.input).count(name) != 1:
            raise self.unknown(f"{name}, which {len(readers)} nodes read,")

    def _sizes(self, name: str) -> list[int]:
        """Return the sizes of a value, 0 where they vary, [] where its shape is unknown."""
        tensor = self.tensors.get(name)
        return [] if tensor is None else [int(dim.dim_value) for dim in tensor.shape.dim]

    def _precision(self) -> Precision:
        """Return the precision of the nodes that are written again."""
        names = [node.input[0] for node in self.graph.node if node.op_type in self.writers]
        types = {self.tensors[name].elem_type for name in names if name in self.tensors}
        if len(types) > 1 or not types <= set(_PRECISIONS):
            got = ", ".join(onnx.TensorProto.DataType.Name(each) for each in sorted(types))
            raise self.unknown("arithmetic", got=got, expected="fp32 or fp16")
        return _PRECISIONS[types.pop()] if types else "fp32"

    def _attributes(self, node: onnx.NodeProto, *known: str) -> dict[str, Any]:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        for name, value in attributes.items():
            if name not in known:
                raise self.unknown(f"{name} of {node.name}", got=value)
        return attributes

    def _check(self, node: onnx.NodeProto) -> None:
        """Refuse an operator or attribute that came after opset 20."""
        opset = _OPTIONS.opset
        if not onnx.defs.has(node.op_type, opset, node.domain):
            raise self.unknown(f"operator {node.op_type}", expected=f"one of opset {opset}")
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
        self._attributes(node, *schema.attributes)


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    real = source.resolve()  # TensorRT-RTX refuses symbolic links
    try:
        os.link(real, target)
    except OSError:  # another file system, or a file system without links
        shutil.copyfile(real, target)
