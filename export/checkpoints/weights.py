"""The tensors of one model in a checkpoint, read from disk one at a time.

Files are not mapped, because mapped pages would count as used memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from sld_edge.engines.errors import CheckpointError, MissingPackageError, one_line, shortened
from sld_edge.engines.files import JSON_LIMIT, json_from_bytes, opened

_DTYPES = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "U8": "|u1",
    "BOOL": "|b1",
}
_PREFIX = 8  # bytes of the header's length
_MOST_TENSORS = 100_000
_LONGEST_NAME = 1000
_MOST_AXES = 8
_AGAIN = "download it again"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The place of a tensor: its file, offset there in bytes, dtype of safetensors, shape."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        return math.prod(self.shape) * np.dtype(_DTYPES[self.dtype]).itemsize

    def read(self) -> NDArray[Any]:
        """Read the tensor; bfloat16 becomes float32, which holds it exactly."""
        count = math.prod(self.shape)
        try:
            with opened(self.file) as stream:
                stream.seek(self.offset)
                flat = np.fromfile(stream, dtype=_DTYPES[self.dtype], count=count)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.file}", got=error.strerror) from error
        if flat.size != count:
            raise CheckpointError(f"{self.file} is cut short", do=_AGAIN)
        if self.dtype == "BF16":
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        return flat.reshape(self.shape)


class Weights:
    """The named tensors of a model; `finish` refuses tensors that were not used."""

    def __init__(self, entries: Mapping[str, Entry], *, name: str) -> None:
        """`name` is the model's name in error messages, for example "unet"."""
        self.name = name
        self._entries = dict(entries)
        self._unused = set(self._entries)
        self.watch: Callable[[int], None] | None = None  # called with the bytes of each tensor

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def keys(self) -> list[str]:
        """Every tensor's name, in the file's order."""
        return list(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in their files."""
        return sum(entry.nbytes for entry in self._entries.values())

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._entry(key).shape

    def take(self, key: str) -> NDArray[Any]:
        """Read a tensor and count it as used; a CheckpointError names a missing tensor."""
        entry = self._entry(key)
        self._unused.discard(key)
        array = entry.read()
        if self.watch is not None:
            self.watch(entry.nbytes)
        return array

    def ignore(self, keys: Iterable[str]) -> None:
        """Count tensors as used that a graph does not need (each caller says why)."""
        self._unused.difference_update(keys)

    def renamed(self, names: Mapping[str, str]) -> Weights:
        """Return the same tensors; `names` maps old names to new names."""
        entries = {names.get(key, key): entry for key, entry in self._entries.items()}
        renamed = Weights(entries, name=self.name)
        renamed.watch = self.watch
        return renamed

    def reshaped(self, key: str, shape: tuple[int, ...]) -> None:
        """Give a tensor another shape of the same size (a 1x1 convolution as a linear layer)."""
        entry = self._entry(key)
        if math.prod(entry.shape) != math.prod(shape):
            raise CheckpointError(
                f"{self.name}: tensor {key}", got=list(entry.shape), expected=list(shape)
            )
        self._entries[key] = replace(entry, shape=shape)

    def finish(self) -> None:
        """Raise a CheckpointError that names tensors which were not used: the graph lacks them."""
        if self._unused:
            some = ", ".join(sorted(self._unused)[:3])
            raise CheckpointError(
                f"{self.name}: {len(self._unused)} tensor(s) of the checkpoint fit no place in the "
                f"graph: {some}",
                do="the config does not match these weights, or the architecture is not known; "
                "try --via torch",
            )

    def _entry(self, key: str) -> Entry:
        try:
            return self._entries[key]
        except KeyError:
            raise CheckpointError(
                f"{self.name}: the checkpoint lacks tensor {key}",
                do="the config does not match these weights, or the download is incomplete",
            ) from None


def entries_from_safetensors(path: Path) -> dict[str, Entry]:
    """Read the header of a `.safetensors` file; a malformed file is a CheckpointError.

    The package safetensors checks that tensors do not overlap, leave gaps or end too early.
    """
    raw, size = _header(path)
    _check_whole(path)
    header = json_from_bytes(raw, origin=f"{path}: header", error=CheckpointError, do=_AGAIN)
    header.pop("__metadata__", None)
    if len(header) > _MOST_TENSORS:
        raise CheckpointError(f"{path}: {len(header)} tensors", expected=f"up to {_MOST_TENSORS}")
    start = _PREFIX + len(raw)
    return {key: _entry(path, key, info, start, size) for key, info in header.items()}


def _header(path: Path) -> tuple[bytes, int]:
    """Return the bytes of the header and the size of the file."""
    try:
        with opened(path) as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(_PREFIX), "little")
            if size < _PREFIX or length > min(JSON_LIMIT, size - _PREFIX):
                raise _not_whole(path, "no valid header")
            return stream.read(length), size
    except OSError as error:
        raise CheckpointError(f"cannot read {path}", got=error.strerror) from error


def _check_whole(path: Path) -> None:
    try:
        from safetensors import safe_open
    except ImportError as error:
        raise MissingPackageError(
            "safetensors", extra="export", why="reading a checkpoint"
        ) from error
    try:
        with safe_open(path, framework="np"):
            pass
    except Exception as error:  # SafetensorError, or an error of the system
        raise _not_whole(path, one_line(error)) from error


def _not_whole(path: Path, complaint: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not a whole safetensors file: damaged or cut short", got=complaint, do=_AGAIN
    )


def _entry(path: Path, key: str, info: object, start: int, size: int) -> Entry:
    """Check the values of a tensor's entry; no later code checks them again."""
    what = f"{path}: tensor {shortened(key, 100)}"
    if len(key) > _LONGEST_NAME or not isinstance(info, dict):
        raise CheckpointError(what, got=info, expected="an object and a short name", do=_AGAIN)
    dtype, shape, offsets = (info.get(name) for name in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(f"{what} has dtype", got=dtype, expected=", ".join(_DTYPES))
    # Where a size is 0 the other sizes are limited, too: NumPy does not take every such shape.
    if not _are_sizes(shape) or math.prod(max(side, 1) for side in shape) > size:
        raise CheckpointError(f"{what} has shape", got=shape, expected="sizes", do=_AGAIN)
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{what} has offsets", got=offsets, expected="two", do=_AGAIN)
    entry = Entry(file=path, offset=start + offsets[0], dtype=dtype, shape=tuple(shape))
    if offsets[1] - offsets[0] != entry.nbytes or start + offsets[1] > size:
        raise CheckpointError(f"{what} is cut short", do=_AGAIN)
    return entry


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) <= _MOST_AXES
        and all(type(size) is int and size >= 0 for size in value)
    )
