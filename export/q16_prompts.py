"""Q16's two prompt vectors, read from the pickle they are published in without running its code.

A pickle names functions to call. Here each of the few names that NumPy and torch use for an array
of numbers stands for a small class of ours that only remembers its arguments; any other name is
refused. Nothing of numpy, torch or the standard library is called by the file's wish.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sld_edge.engines.errors import CheckpointError, one_line
from sld_edge.engines.files import read_limited

_MOST_BYTES = 2**24  # the published file has some kilobytes
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # torch.save before zip files
_FLOATS = ("f2", "f4", "f8")


class _RefusedError(ValueError):
    """Something in the file that no array of floats needs."""


def read_q16_prompts(path: Path, width: int) -> NDArray[np.float32]:
    """Return the vectors of "appropriate" and "inappropriate", float32 [2,width].

    Takes `.npy`, and pickles or torch files of one array, tensor or list of numbers.

    Raises:
        CheckpointError: not that, of another shape, not finite, or a pickle that would do anything
            else than hold it.
    """
    data = read_limited(path, _MOST_BYTES, error=CheckpointError)
    if not data:
        raise CheckpointError(f"{path}", got="nothing", expected="Q16's prompts")
    try:
        array = _array_from_bytes(data)
    # A damaged pickle can raise anything, but nothing of it has run.
    except Exception as error:
        raise CheckpointError(
            f"{path} does not hold just an array of floats",
            got=one_line(error),
            expected=f"Q16's prompts, [2,{width}]",
            do="take the file prompts.p of the Q16 repository",
        ) from error
    if array.shape != (2, width):
        raise CheckpointError(
            f"{path}", got=list(array.shape), expected=f"[2,{width}], as CLIP's image embedding"
        )
    prompts = array.astype(np.float32)
    if not np.isfinite(prompts).all() or not (np.linalg.norm(prompts, axis=1) > 0).all():
        raise CheckpointError(f"{path}", got="NaN, infinity or zeros", expected="two vectors")
    return prompts


def _array_from_bytes(data: bytes) -> NDArray[Any]:
    if data.startswith(b"\x93NUMPY"):
        found: Any = np.load(io.BytesIO(data), allow_pickle=False)
    elif data.startswith(b"PK\x03\x04"):
        found = _loaded_zip(data)
    else:
        stream = io.BytesIO(data)
        found = _load(stream)
        if found == _LEGACY_MAGIC:
            found = _loaded_legacy(data)
    return _plain(found)


def _plain(found: Any) -> NDArray[Any]:
    """Return what the stand-ins remember as an array."""
    if isinstance(found, _Tensor | _Array):
        return found.array()
    if isinstance(found, np.ndarray):
        if found.dtype.kind != "f":
            raise _RefusedError(f"numbers of type {found.dtype}")
        return found
    # Exactly two, so that nested references cannot grow into billions.
    if isinstance(found, list | tuple) and len(found) == 2:
        return np.stack([_row(row) for row in found])
    raise _RefusedError(f"a {type(found).__name__.lstrip('_').lower()}")


def _row(row: Any) -> NDArray[Any]:
    if isinstance(row, list | tuple):
        if not all(isinstance(number, float) for number in row):
            raise _RefusedError("a list that does not hold floats")
        return np.array(row, np.float64)
    if isinstance(row, _Tensor | _Array):
        return row.array()
    raise _RefusedError(f"a {type(row).__name__}")


# --- stand-ins for what the file names ----------------------------------------------------------


class _Dtype:
    """numpy.dtype."""

    def __init__(self, code: str, *_: object) -> None:
        if code not in _FLOATS:
            raise _RefusedError(f"numbers of type {code!r}")
        self._code, self._order = code, "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">"):
            raise _RefusedError(f"byte order {state[1]!r}")
        self._order = state[1]

    def numpy(self) -> np.dtype[Any]:
        return np.dtype(f"{self._order}{self._code}")


class _Array:
    """numpy.ndarray, from `_reconstruct` and its state, or from `_frombuffer`."""

    def __init__(self, *_: object) -> None:
        self._state: tuple[Any, Any, Any, Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        self._state = (raw, dtype, shape, "F" if fortran else "C")

    @classmethod
    def from_buffer(cls, raw: Any, dtype: Any, shape: Any, order: Any) -> _Array:
        array = cls()
        array._state = (raw, dtype, shape, order)
        return array

    def array(self) -> NDArray[Any]:
        if self._state is None:
            raise _RefusedError("an array without content")
        raw, dtype, shape, order = self._state
        if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes | bytearray):
            raise _RefusedError("an array of objects")
        if order not in ("C", "F"):
            raise _RefusedError(f"an array in the order {order!r}")
        return np.frombuffer(raw, dtype.numpy()).reshape(_sizes(shape), order=order)


@dataclass(frozen=True)
class _StorageKind:
    """torch.FloatStorage and its like: what the bytes of a storage are."""

    dtype: type[np.floating[Any]]


@dataclass
class _Storage:
    """One storage of torch: flat numbers, read once where they lie is known."""

    dtype: type[np.floating[Any]]
    count: int
    raw: bytes | None = field(default=None, repr=False)

    def array(self) -> NDArray[Any]:
        if self.raw is None:
            raise _RefusedError("a storage without content")
        return np.frombuffer(self.raw, np.dtype(self.dtype).newbyteorder("<"), count=self.count)


class _Tensor:
    """A tensor of torch, from `_rebuild_tensor_v2`: a view of a storage."""

    def __init__(self, storage: Any, offset: Any, size: Any, stride: Any, *_: object) -> None:
        self._view = storage, offset, size, stride

    def array(self) -> NDArray[Any]:
        storage, offset, size, stride = self._view
        if not isinstance(storage, _Storage):
            raise _RefusedError("a tensor without storage")
        shape, steps, (first,) = _sizes(size), _sizes(stride), _sizes((offset,))
        if len(shape) != len(steps) or 0 in shape:
            raise _RefusedError("a tensor of no shape")
        flat = storage.array()
        places = np.full(shape, first, np.int64)
        for axis, (length, step) in enumerate(zip(shape, steps, strict=True)):
            along = [1] * len(shape)
            along[axis] = length
            places += (np.arange(length) * step).reshape(along)
        return flat[places]


def _sizes(values: Any) -> tuple[int, ...]:
    sizes = tuple(values)
    good = all(isinstance(size, int) and 0 <= size <= _MOST_BYTES for size in sizes)
    if not good or len(sizes) > 4 or math.prod(size for size in sizes if size) > _MOST_BYTES:
        raise _RefusedError(f"a shape {one_line(sizes)}")
    return sizes


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """`_codecs.encode`, as old pickles write bytes."""
    if encoding != "latin1":
        raise _RefusedError(f"text in {encoding!r}")
    return text.encode("latin1")


def _nothing(*_: object) -> None:
    """`OrderedDict()`, a tensor's hooks, of which there are none."""


def _load_from_bytes(data: bytes) -> Any:
    """A storage within a plain pickle, itself saved by torch."""
    return _loaded_zip(data) if data.startswith(b"PK\x03\x04") else _loaded_legacy(data)


_NAMES: Mapping[tuple[str, str], Callable[..., Any] | _StorageKind] = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _Array.from_buffer for core in ("core", "_core")},
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): _nothing,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch.storage", "_load_from_bytes"): _load_from_bytes,
    ("torch", "HalfStorage"): _StorageKind(np.float16),
    ("torch", "FloatStorage"): _StorageKind(np.float32),
    ("torch", "DoubleStorage"): _StorageKind(np.float64),
}


# --- the files ----------------------------------------------------------------------------------


# The C unpickler sets aside memory for any memo index a file names; this one does not.
class _Unpickler(pickle._Unpickler):
    """Knows the names above and no other."""

    def __init__(self, stream: io.BytesIO, storage: Callable[[str, _Storage], _Storage]) -> None:
        super().__init__(stream, encoding="latin1")
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES:
            raise _RefusedError(f"it asks for {module}.{name}")
        return _NAMES[module, name]

    def persistent_load(self, pid: Any) -> Any:
        word, kind, key, _, count, *_ = pid
        if word != "storage" or not isinstance(kind, _StorageKind) or not isinstance(key, str):
            raise _RefusedError("something other than a storage of floats")
        (count,) = _sizes((count,))
        return self._storage(key, _Storage(kind.dtype, count))


def _no_storage(key: str, storage: _Storage) -> _Storage:
    raise _RefusedError("a storage that is elsewhere")


def _load(stream: io.BytesIO, storage: Callable[[str, _Storage], _Storage] = _no_storage) -> Any:
    start = stream.tell()
    for _ in pickletools.genops(stream):  # refuses lengths beyond the file before memory is taken
        pass
    stream.seek(start)
    return _Unpickler(stream, storage).load()


def _loaded_zip(data: bytes) -> Any:
    """What torch.save wrote: `NAME/data.pkl`, and each storage in `NAME/data/KEY`."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        (entry,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        root = entry.removesuffix("data.pkl")

        def content(name: str) -> bytes:
            if archive.getinfo(name).file_size > _MOST_BYTES:
                raise _RefusedError(f"{name} is larger than Q16's prompts can be")
            return archive.read(name)

        def storage(key: str, empty: _Storage) -> _Storage:
            empty.raw = content(f"{root}data/{key}")
            return empty

        if f"{root}byteorder" in archive.namelist() and content(f"{root}byteorder") != b"little":
            raise _RefusedError("numbers in big-endian order")
        return _load(io.BytesIO(content(entry)), storage)


def _loaded_legacy(data: bytes) -> Any:
    """What torch.save wrote before zip files: five pickles, then each storage."""
    stream = io.BytesIO(data)
    storages: dict[str, _Storage] = {}
    magic, protocol, _ = _load(stream), _load(stream), _load(stream)
    if (magic, protocol) != (_LEGACY_MAGIC, _LEGACY_PROTOCOL):
        raise _RefusedError("not a file of torch")
    found = _load(stream, lambda key, empty: storages.setdefault(key, empty))
    keys = _load(stream)
    for key in keys:
        count = int.from_bytes(stream.read(8), "little")
        if key not in storages or count != storages[key].count:
            raise _RefusedError("a storage of another size")
        storages[key].raw = stream.read(count * np.dtype(storages[key].dtype).itemsize)
    return found
