"""Memory that a bundle's graphs need, from the graphs alone: nothing is loaded or run.

python -m sld_edge.export.memory BUNDLE PIXELS prints it as JSON, for `sld-run --certify`.

Activations are the most bytes of tensors alive at once when the nodes run in the file's order. An
engine adds its workspace, and saves memory where it fuses nodes or computes in place, so this is an
estimate. Tensors that are computed from weights alone count as weights, as large as on disk.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from sld_edge.engines.errors import CheckpointError, InputError
from sld_edge.export.graphs.decompose import inferred_tensors
from sld_edge.runtime.bundle import Bundle
from sld_edge.runtime.commands.console import run_command
from sld_edge.runtime.manifest import SHALLOW

_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten")  # no bytes of their own
_SHAPES = ("Shape", "Concat", "Div")  # nodes that compute the number of branches
_LOOP = ("unet", "guidance")
_UNUSED = (SHALLOW,)  # by a run that does not ask for savings


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes that one component needs at one size."""

    weights: int
    activations: int

    @property
    def total(self) -> int:
        """Both together."""
        return self.weights + self.activations


def needs(bundle: Bundle, size: int, batch: int) -> dict[str, Need]:
    """Return the need of each component for `batch` square pictures of `size` pixels.

    Raises:
        InputError: a batch or size that no graph takes.
        CheckpointError: a graph whose shapes are not known.
    """
    manifest = bundle.manifest
    if batch < 1:
        raise InputError("batch", got=batch, expected="1 or more")
    if size < 1 or size % manifest.latents.downscale:
        expected = f"a multiple of {manifest.latents.downscale}"
        raise InputError("size", got=size, expected=expected)
    concepts, cells = len(manifest.safety_concepts), size // manifest.latents.downscale
    sizes = {
        "B": batch,
        "N": 1,  # texts are encoded, and pictures decoded, one after another
        "K*B": (2 + concepts) * batch,
        "n": max(1, concepts),
        "L": manifest.text_length,
        **dict.fromkeys("hw", cells),
        **dict.fromkeys("HW", size),
    }
    by_name = {}
    for name, part in manifest.components.items():
        model = onnx.load(str(bundle.path / part.files[0].path), load_external_data=False)
        weights = sum(file.bytes for file in part.files)
        if name == SHALLOW:  # most of its file is the UNet's own
            weights = sum(map(_stored_bytes, model.graph.initializer))
        its_sizes = {**sizes, "B": 1} if name == "vae_decoder" else sizes
        by_name[name] = Need(weights=weights, activations=peak_bytes(model, its_sizes))
    return by_name


def _stored_bytes(tensor: onnx.TensorProto) -> int:
    elements: int = math.prod(tensor.dims)
    return elements * _width(tensor.data_type)


def whole_run(parts: Mapping[str, Need]) -> int:
    """Everything that makes a picture loaded, one component running at a time."""
    used = [need for name, need in parts.items() if name not in _UNUSED]
    return sum(need.weights for need in used) + max(need.activations for need in used)


def low_memory_run(parts: Mapping[str, Need]) -> int:
    """The same with text encoder and decoder loaded only while they run; the UNet stays."""
    loop = [parts[name] for name in _LOOP]
    beside = max(parts[name].total for name in ("text_encoder", "vae_decoder"))
    return sum(need.weights for need in loop) + max(beside, *(need.activations for need in loop))


def peak_bytes(model: onnx.ModelProto, sizes: Mapping[str, int]) -> int:
    """Return the most bytes alive at once, with the named sizes filled in.

    Raises:
        CheckpointError: a size without a value, or a tensor whose shape is not known.
    """
    graph = model.graph
    nbytes = _nbytes(_with_sizes(model, sizes))
    owners = {tensor.name: "" for tensor in graph.initializer}  # "" is of the weights
    alive = {item.name for item in graph.input}
    owners |= {name: name for name in alive}
    for node in graph.node:
        given = [name for name in node.input if name]
        constant = all(owners[name] == "" for name in given)
        for name in node.output:
            view = node.op_type in _VIEWS
            owners[name] = "" if constant else owners[node.input[0]] if view else name
    last = {owners[name]: i for i, node in enumerate(graph.node) for name in node.input if name}
    last |= {owners[item.name]: len(graph.node) for item in graph.output}
    peak = total = sum(map(nbytes.__getitem__, alive))
    for i, node in enumerate(graph.node):
        made = {name for name in node.output if owners[name] == name}
        alive |= made
        total += sum(map(nbytes.__getitem__, made))
        peak = max(peak, total)
        touched = {owners[name] for name in (*node.input, *node.output) if name}
        dead = {name for name in touched & alive if last.get(name, i) <= i}
        alive -= dead
        total -= sum(map(nbytes.__getitem__, dead))
    return peak


def _with_sizes(model: onnx.ModelProto, sizes: Mapping[str, int]) -> onnx.ModelProto:
    """Fill in the inputs' sizes and the constants computed from them; shapes are inferred later."""
    filled = onnx.ModelProto()
    filled.CopyFrom(model)
    graph, known = filled.graph, {}
    for item in graph.input:
        for dim in item.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                if dim.dim_param not in sizes:
                    raise CheckpointError(f"{graph.name}: no value for the size {dim.dim_param}")
                dim.dim_value = sizes[dim.dim_param]
    for item in graph.output:
        item.type.tensor_type.ClearField("shape")
    inputs = {item.name: item.type.tensor_type for item in graph.input}
    for tensor in graph.initializer:
        if tensor.data_type == tensor.INT64 and tensor.data_location != tensor.EXTERNAL:
            known[tensor.name] = numpy_helper.to_array(tensor)
    kept = []
    for node in graph.node:
        value = _computed(node, inputs, known) if node.op_type in _SHAPES else None
        if value is None:
            kept.append(node)
        else:
            known[node.output[0]] = value
            graph.initializer.append(numpy_helper.from_array(value, node.output[0]))
    del graph.node[:]
    graph.node.extend(kept)
    return filled


def _computed(
    node: onnx.NodeProto,
    inputs: Mapping[str, onnx.TypeProto.Tensor],
    known: Mapping[str, NDArray[np.int64]],
) -> NDArray[np.int64] | None:
    """Return a node's value if it follows from the inputs' sizes alone, else None."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "Shape":
        if node.input[0] not in inputs:
            return None
        dims = [dim.dim_value for dim in inputs[node.input[0]].shape.dim]
        return np.array(dims[attributes.get("start", 0) : attributes.get("end")], np.int64)
    if not all(name in known for name in node.input):
        return None
    values = [known[name] for name in node.input]
    return np.concatenate(values) if node.op_type == "Concat" else values[0] // values[1]


def _nbytes(filled: onnx.ModelProto) -> dict[str, int]:
    """Return the bytes of every tensor, by name; tensors that no node makes take none."""
    sizes = {}
    for name, tensor in inferred_tensors(filled).items():
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
            shape = [dim.dim_value for dim in tensor.shape.dim]
            sizes[name] = math.prod(shape) * _width(tensor.elem_type)
    sizes |= {tensor.name: 0 for tensor in filled.graph.initializer}
    for node in filled.graph.node:
        for name in node.output:
            if name and name not in sizes:
                raise CheckpointError(f"{filled.graph.name}: the shape of {name} is not known")
    return sizes


def _width(kind: int) -> int:
    """Return the bytes of an element of ONNX's type `kind`."""
    return int(helper.tensor_dtype_to_np_dtype(kind).itemsize)


def main(arguments: Sequence[str]) -> int:
    """Print the need of each component and of a run, in bytes, as JSON; return the exit code."""
    return run_command(lambda: _print(arguments))


def _print(arguments: Sequence[str]) -> None:
    if len(arguments) != 2 or not arguments[1].isdecimal():
        raise InputError("arguments", got=" ".join(arguments), expected="BUNDLE PIXELS")
    parts = needs(Bundle.open(arguments[0]), int(arguments[1]), 1)
    whole = {"a run": whole_run(parts), "a run with --low-memory": low_memory_run(parts)}
    print(json.dumps({"components": {k: asdict(v) for k, v in parts.items()}, **whole}))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
