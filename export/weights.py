"""The tensors of one model in a checkpoint, read from disk one at a time, each used exactly once.

Tensors are read with seek and read, not mapped: mapped pages would count as memory used.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sld_edge.engines.errors import CheckpointError

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
_MAX_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where one tensor lies: file, offset in it, storage dtype of safetensors, shape."""

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
        count = int(np.prod(self.shape, dtype=np.int64))
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            flat = np.fromfile(stream, dtype=_DTYPES[self.dtype], count=count)
        if flat.size != count:
            raise CheckpointError(f"{self.file} is cut short", do="download it again")
        if self.dtype == "BF16":
            flat = (flat.astype(np.uint32) << 16).view(np.float32)
        return flat.reshape(self.shape)


class Weights:
    """Named tensors of one model; `take` gives each once, `finish` refuses any left over."""

    def __init__(self, entries: Mapping[str, Entry], *, name: str) -> None:
        """`name` is what error messages call the model, for example "unet"."""
        self.name = name
        self._entries = dict(entries)
        self._unused = set(self._entries)
        self.watch: Callable[[int], None] | None = None  # told the bytes of every tensor taken

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

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
        """Read a tensor and count it as used. A missing one is a CheckpointError that names it."""
        entry = self._entry(key)
        self._unused.discard(key)
        array = entry.read()
        if self.watch is not None:
            self.watch(entry.nbytes)
        return array

    def ignore(self, keys: Iterable[str]) -> None:
        """Count tensors as used that a graph rightly does not need (each caller says why)."""
        self._unused.difference_update(keys)

    def renamed(self, names: Mapping[str, str]) -> Weights:
        """Return the same tensors, with those in `names` (old to new) under their new names."""
        entries = {names.get(key, key): entry for key, entry in self._entries.items()}
        renamed = Weights(entries, name=self.name)
        renamed.watch = self.watch
        return renamed

    def reshaped(self, key: str, shape: tuple[int, ...]) -> None:
        """Give a tensor another shape of the same size (a 1x1 convolution as a linear layer)."""
        entry = self._entry(key)
        if np.prod(entry.shape, dtype=np.int64) != np.prod(shape, dtype=np.int64):
            raise CheckpointError(
                f"{self.name}: tensor {key}", got=list(entry.shape), expected=list(shape)
            )
        self._entries[key] = replace(entry, shape=shape)

    def finish(self) -> None:
        """Raise a CheckpointError that names tensors no one took: the graph would lack them."""
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
    """Read the header of one `.safetensors` file; malformed ones are a CheckpointError."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER + 1
            if length > min(_MAX_HEADER, size - 8):
                raise ValueError("no valid header")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}", got=error.strerror) from error
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file", got=error, do="download it again"
        ) from error
    header.pop("__metadata__", None)
    entries = {}
    for key, info in header.items():
        begin, end = info["data_offsets"]
        shape = tuple(info["shape"])
        if info["dtype"] not in _DTYPES:
            raise CheckpointError(
                f"{path}: tensor {key} has dtype", got=info["dtype"], expected=", ".join(_DTYPES)
            )
        entry = Entry(file=path, offset=8 + length + begin, dtype=info["dtype"], shape=shape)
        if end - begin != entry.nbytes or begin < 0 or 8 + length + end > size:
            raise CheckpointError(f"{path}: tensor {key} is cut short", do="download it again")
        entries[key] = entry
    return entries
