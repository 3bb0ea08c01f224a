"""A small ONNX graph builder; nodes and initializers have the names of the checkpoint's keys.

Weights go to `NAME.onnx.data` one by one while the graph is built, so memory holds one at a time.

Only values that depend on the text differ between branches. So every value is narrow, with one row
per image, or wide, with one row per image and branch. An operation that reads both kinds first
repeats its narrow inputs. In this way the branches share the graph's prefix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from sld_edge.engines.errors import CheckpointError, InputError
from sld_edge.export.checkpoints.weights import Weights

Precision = Literal["fp32", "fp16"]

_BLOCK = 8  # columns of a transposed array that are copied together
_PART = 1 << 18  # numbers that are checked together
_INLINE_BYTES = 1024  # smaller tensors stay in the .onnx file
_PAGE_BYTES = 4096
_DTYPES: dict[str, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
}
_IR_VERSIONS = {20: 9, 23: 11}  # the oldest IR that may hold each opset


@dataclass(frozen=True, kw_only=True)
class GraphOptions:
    """The form of a graph.

    `precision` is the arithmetic inside (inputs and outputs are always FP32). `storage` is the type
    of the weights on disk (None: as the precision; "fp16" with "fp32" arithmetic halves the file,
    and weights are cast when loaded). `attention` is one operator (opset 23) or matrix products
    (opset 20, for older engines). With `shared_prefix` values that do not depend on the text are
    computed once per image.
    """

    precision: Precision = "fp32"
    storage: Precision | None = None
    attention: Literal["op", "decomposed"] = "op"
    shared_prefix: bool = True

    @property
    def opset(self) -> int:
        """The opset with the operators of this form."""
        return 23 if self.attention == "op" else 20


@dataclass(frozen=True)
class Value:
    """A tensor of the graph: its name, rank, and the rows of its first axis (see the module)."""

    name: str
    rank: int
    batch: Literal["none", "narrow", "wide"] = "none"


class GraphBuilder:
    """Builds a graph; the end of the `with` block writes it, and an exception leaves no file."""

    def __init__(
        self,
        path: Path,
        options: GraphOptions,
        weights: Weights | None = None,
        *,
        inline: bool = False,
    ) -> None:
        """Write to `path` and, for large tensors unless `inline`, to `path` + ".data" beside it."""
        storage = options.storage if options.storage is not None else options.precision
        if options.precision == "fp16" and storage == "fp32":
            raise InputError(
                "storage fp32 with precision fp16", expected="storage fp16", do="drop the storage"
            )
        self.options = options
        self.dtype = _DTYPES[options.precision]
        # A copy, so that `ignore` and `reshaped` do not change the caller's weights.
        self.weights = (weights if weights is not None else Weights({}, name="")).renamed({})
        self.storage = _DTYPES[storage]
        self._path = path
        self._inline = inline
        self._data_path = path.with_name(path.name + ".data")
        self._data: BinaryIO | None = None
        self._written: dict[bytes, tuple[int, int]] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._used_names: dict[str, int] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], Value] = {}
        self._weights: dict[str, Value] = {}
        self._wide: dict[str, Value] = {}
        self._new_names: dict[str, str] = {}  # in the file, by the name during the build
        self._branches: tuple[Value, Value] | None = None  # K, and K*B

    def __enter__(self) -> GraphBuilder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._save()
        except BaseException:
            self._discard()
            raise
        if error is not None:
            self._discard()

    # --- the boundary -------------------------------------------------------------------------

    def input(
        self,
        name: str,
        dtype: type[np.generic],
        shape: Sequence[int | str],
        batch: Literal["none", "narrow", "wide"] = "narrow",
    ) -> Value:
        """Declare an input of the graph."""
        self._used_names[name] = 1
        self._inputs.append(_value_info(name, dtype, shape))
        return Value(name, len(shape), batch)

    def output(
        self, value: Value, name: str, dtype: type[np.generic], shape: Sequence[int | str]
    ) -> None:
        """Declare `value` an output of the graph, called `name`; other nodes may still read it."""
        if self._unique(name) != name:
            raise ValueError(f"{name} is the name of another value")
        computed = any(value.name in node.output for node in self._nodes)
        if not computed or value.name in self._new_names:
            # An input, a constant or an output already: its name must stay.
            value = self.node("Identity", value, name=f"{name}/copy")
        # Otherwise without an Identity: TensorRT takes bytes only from the node that makes them.
        self.rename(value, name)
        self._outputs.append(_value_info(name, dtype, shape))

    def adopt(self, graph: onnx.GraphProto) -> None:
        """Take inputs, outputs and tensors from another graph, and reserve all its names."""
        self._inputs.extend(graph.input)
        self._outputs.extend(graph.output)
        self._initializers.extend(graph.initializer)
        for owner in (graph.input, graph.initializer):
            self._used_names.update((item.name, 1) for item in owner)
        self._used_names.update((name, 1) for node in graph.node for name in node.output)

    # --- nodes --------------------------------------------------------------------------------

    def node(
        self, op: str, *inputs: Value | None, name: str, rank: int | None = None, **attributes: Any
    ) -> Value:
        """Add an operation with one output; None is an absent optional input.

        The output has the largest rank among the inputs, unless `rank` says otherwise.
        """
        return self.nodes(op, *inputs, name=name, rank=rank, count=1, **attributes)[0]

    def nodes(
        self,
        op: str,
        *inputs: Value | None,
        name: str,
        count: int,
        rank: int | None = None,
        **attributes: Any,
    ) -> list[Value]:
        """Add an operation with `count` outputs."""
        is_wide = any(value is not None and value.batch == "wide" for value in inputs)
        aligned = [
            self.widen(value) if is_wide and value is not None else value for value in inputs
        ]
        present = [value for value in aligned if value is not None]
        is_narrow = any(value.batch == "narrow" for value in present)
        batch: Literal["none", "narrow", "wide"] = (
            "wide" if is_wide else "narrow" if is_narrow else "none"
        )
        if op == "Shape":
            batch = "none"
        if rank is None:
            rank = max((value.rank for value in present), default=0)
        names = [self._unique(name) for _ in range(count)]
        self._nodes.append(
            helper.make_node(
                op,
                [value.name if value is not None else "" for value in aligned],
                names,
                name=f"{names[0]}/{op}",
                **attributes,
            )
        )
        return [Value(each, rank, batch) for each in names]

    def copy(self, node: onnx.NodeProto) -> None:
        """Add a node of the adopted graph unchanged."""
        self._nodes.append(node)

    def rename(self, value: Value, name: str) -> None:
        """Give `value` another name in the file."""
        self._new_names[value.name] = name

    def sizes(self, value: Value, start: int, end: int) -> Value:
        """Return the sizes of the axes `start` to `end` at run time."""
        return self.node("Shape", value, name=f"{value.name}/sizes", rank=1, start=start, end=end)

    def cast(self, value: Value, dtype: np.dtype[Any] | type[np.generic], name: str) -> Value:
        """Convert to another dtype."""
        return self.node("Cast", value, name=name, to=_onnx_dtype(dtype))

    def inner(self, value: Value) -> Value:
        """Convert FP32 to the inner precision."""
        fp32 = self.dtype == np.float32
        return value if fp32 else self.cast(value, self.dtype, f"{value.name}/inner")

    def outer(self, value: Value) -> Value:
        """Convert the inner precision to FP32."""
        fp32 = self.dtype == np.float32
        return value if fp32 else self.cast(value, np.float32, f"{value.name}/outer")

    def split(self, value: Value, sizes: Sequence[int], axis: int, name: str) -> list[Value]:
        """Cut a value in parts of the given sizes."""
        return self.nodes("Split", value, self.ints(*sizes), name=name, count=len(sizes), axis=axis)

    # --- constants and weights ----------------------------------------------------------------

    def constant(self, array: NDArray[Any], name: str) -> Value:
        """Return `array` as a value; equal constants are stored once."""
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            unique = self._unique(name)
            self._store(unique, array)
            self._constants[key] = Value(unique, array.ndim)
        return self._constants[key]

    def ints(self, *numbers: int) -> Value:
        """Return a vector of int64: a shape, axes or sizes."""
        text = "_".join(str(number) for number in numbers)
        return self.constant(np.array(numbers, np.int64), f"ints/{text}")

    def scalar(self, number: float, dtype: np.dtype[Any] | None = None) -> Value:
        """Return a number, in the inner precision unless `dtype` is given."""
        array = np.array(number, dtype if dtype is not None else self.dtype)
        return self.constant(array, f"number/{number:g}/{array.dtype.name}")

    def weight(self, key: str, shape: tuple[int, ...], *, transpose: bool = False) -> Value:
        """Return a tensor of the checkpoint, in the inner precision.

        `shape` is the shape by the config; another shape is a CheckpointError.
        """
        if key not in self._weights:
            stored = self.stored_weight(key, shape, transpose=transpose)
            if self.storage != self.dtype:
                stored = self.cast(stored, self.dtype, name=f"{key}/inner")
            self._weights[key] = stored
        return self._weights[key]

    def stored_weight(self, key: str, shape: tuple[int, ...], *, transpose: bool = False) -> Value:
        """Return a tensor of the checkpoint in its stored type, to look up rows before a cast."""
        if self.weights.shape(key) != shape:
            raise CheckpointError(
                f"{self.weights.name}: tensor {key} does not fit the config",
                got=list(self.weights.shape(key)),
                expected=list(shape),
            )
        array = self._checked(key, self.weights.take(key))
        self._store(self._unique(key), array.T if transpose else array)
        return Value(key, len(shape))

    def _checked(self, key: str, array: NDArray[Any]) -> NDArray[Any]:
        tensor = f"{self.weights.name}: tensor {key}"
        if array.dtype.kind != "f":
            raise CheckpointError(tensor, got=array.dtype.name, expected="floating-point numbers")
        with np.errstate(over="ignore"):
            stored = array.astype(self.storage, copy=False)
        if not _all_finite(stored):
            if _all_finite(array):
                largest = float(np.abs(array).max())
                raise CheckpointError(
                    tensor,
                    got=f"{largest:g}",
                    expected="at most 65504 in FP16",
                    do="export as fp32",
                )
            raise CheckpointError(tensor, got="NaN or infinity", expected="finite numbers")
        return stored

    # --- branches -----------------------------------------------------------------------------

    def set_branches(self, wide: Value, narrow: Value) -> None:
        """Take the number of branches K from the batch sizes of two values."""
        batch = self.sizes(wide, 0, 1)
        count = self.node("Div", batch, self.sizes(narrow, 0, 1), name="branches")
        self._branches = count, batch

    def widen(self, value: Value) -> Value:
        """Repeat a narrow value for every branch (branch-major); a second call adds no nodes."""
        if value.batch != "narrow":
            return value
        if value.name not in self._wide:
            if self._branches is None:
                raise ValueError("set_branches comes before the first wide value")
            repeats, shape = self._branches
            if value.rank > 1:
                ones, same = self.ints(*[1] * (value.rank - 1)), self.ints(*[0] * (value.rank - 1))
                repeats = self.node("Concat", repeats, ones, name=f"branches/{value.rank}", axis=0)
                shape = self.node("Concat", shape, same, name=f"wide/{value.rank}", axis=0)
            tiled = self.node("Tile", value, repeats, name=f"{value.name}/tiled")
            # TensorRT sees the batch of `wide` in this shape, and fuses attention; not in Tile's.
            wide = self.node("Reshape", tiled, shape, name=f"{value.name}/wide", rank=value.rank)
            self._wide[value.name] = Value(wide.name, value.rank, "wide")
        return self._wide[value.name]

    def like(self, value: Value, other: Value) -> Value:
        """Return `value`, wide if `other` is."""
        return self.widen(value) if other.batch == "wide" else value

    # --- files --------------------------------------------------------------------------------

    def _unique(self, name: str) -> str:
        count = self._used_names.get(name, 0)
        self._used_names[name] = count + 1
        return name if count == 0 else self._unique(f"{name}_{count}")

    def _store(self, name: str, array: NDArray[Any]) -> None:
        array = _in_order(array)
        if self._inline or array.nbytes < _INLINE_BYTES:
            self._initializers.append(numpy_helper.from_array(array, name))
            return
        tensor = TensorProto(name=name, data_type=_onnx_dtype(array.dtype), dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        offset, length = self._written_at(array)
        for key, text in (
            ("location", self._data_path.name),
            ("offset", str(offset)),
            ("length", str(length)),
        ):
            tensor.external_data.add(key=key, value=text)
        self._initializers.append(tensor)

    def _written_at(self, array: NDArray[Any]) -> tuple[int, int]:
        content = array.reshape(-1).view(np.uint8).data
        digest = hashlib.sha256(content).digest()
        if digest not in self._written:
            if self._data is None:
                self._data = self._data_path.open("wb")
            # ONNX Runtime maps tensors that start on a page; small tensors need only a cache line.
            step = _PAGE_BYTES if array.nbytes >= _PAGE_BYTES else 64
            offset = -(-self._data.tell() // step) * step
            self._data.write(b"\0" * (offset - self._data.tell()))
            self._data.write(content)
            self._written[digest] = (offset, array.nbytes)
        return self._written[digest]

    def _save(self) -> None:
        self.weights.finish()
        for node in self._nodes:
            for names in (node.input, node.output):
                names[:] = [self._new_names.get(name, name) for name in names]
        graph = helper.make_graph(
            self._nodes, self._path.stem, self._inputs, self._outputs, self._initializers
        )
        opset = self.options.opset
        model = helper.make_model(
            graph,
            producer_name="sld-edge",
            opset_imports=[helper.make_opsetid("", opset)],
            ir_version=_IR_VERSIONS[opset],
        )
        if self._data is not None:
            self._data.close()
        self._path.write_bytes(model.SerializeToString(deterministic=True))

    def _discard(self) -> None:
        if self._data is not None:
            self._data.close()
            self._data_path.unlink(missing_ok=True)
        self._path.unlink(missing_ok=True)


def _all_finite(array: NDArray[Any]) -> bool:
    """Whether no number is NaN or infinite; FP16 by its bits, nine times as fast as NumPy."""
    if array.dtype != np.float16:
        return bool(np.isfinite(array).all())
    bits = array.reshape(-1).view(np.uint16)
    parts = (bits[start : start + _PART] for start in range(0, bits.size, _PART))
    return all(int((part & 0x7FFF).max()) < 0x7C00 for part in parts)


def _in_order(array: NDArray[Any]) -> NDArray[Any]:
    """Return an array that is C-contiguous; a transposed one is copied in blocks for the cache."""
    if array.ndim != 2 or array.flags.c_contiguous:
        return np.asarray(array, order="C")
    copied = np.empty(array.shape, array.dtype)
    for start in range(0, array.shape[1], _BLOCK):
        columns = slice(start, start + _BLOCK)
        copied[:, columns] = array[:, columns]
    return copied


def _onnx_dtype(dtype: np.dtype[Any] | type[np.generic]) -> int:
    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def _value_info(
    name: str, dtype: type[np.generic], shape: Sequence[int | str]
) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, _onnx_dtype(dtype), list(shape))
