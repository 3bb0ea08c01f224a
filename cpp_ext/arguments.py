"""Checks of a step's arrays, the same for native code and for NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sld_edge.runtime.contract import INPUTS, OUTPUTS, PREDICTIONS, Axes, shape_of

Array = NDArray[Any]
MAX_CONCEPTS: Final = 64  # these two are in the C header too
MAX_THREADS: Final = 1024


def check_inputs(feeds: Mapping[str, Array]) -> dict[str, int]:
    """Return the sizes B, n, h and w of a step's inputs.

    Raises:
        ValueError: a missing or unknown name, or an array of another type, shape or layout.
    """
    _check_names("inputs", feeds, INPUTS)
    sizes: dict[str, int] = {}
    half = feeds[PREDICTIONS[0]].dtype == np.float16
    for name, axes in INPUTS.items():
        kind = "float16" if half and name in PREDICTIONS else "float32"
        _check_array(name, feeds[name], kind, axes, sizes)
    if min(sizes.values()) < 1 or sizes["n"] > MAX_CONCEPTS:
        raise _mistake("sizes of a step", sizes, f"1 or more, and n at most {MAX_CONCEPTS}")
    return sizes


def check_outputs(outputs: Mapping[str, Array], sizes: Mapping[str, int]) -> None:
    """Check arrays that a step writes to.

    Raises:
        ValueError: as for inputs; also a read-only array.
    """
    _check_names("outputs", outputs, OUTPUTS)
    for name, axes in OUTPUTS.items():
        _check_array(name, outputs[name], "float32", axes, dict(sizes))
        if not outputs[name].flags.writeable:
            raise _mistake(name, "a read-only array", "an array that can be written")


def check_overlap(outputs: Mapping[str, Array], feeds: Mapping[str, Array]) -> None:
    """Raise a ValueError for an output that overlaps an input or another output.

    Native code has its own check, which is faster.
    """
    others = dict(feeds)
    for name, array in outputs.items():
        for other, memory in others.items():
            if np.may_share_memory(array, memory):
                raise _mistake(name, f"memory of {other}", "its own memory")
        others[name] = array


def check_threads(threads: int) -> None:
    """Raise a ValueError for a number of threads that is out of range."""
    if not 1 <= threads <= MAX_THREADS:
        raise _mistake("threads", threads, f"1 to {MAX_THREADS}")


def empty_outputs(sizes: Mapping[str, int]) -> dict[str, Array]:
    """Return uninitialised float32 arrays for a step's outputs, for sizes B, n, h and w."""
    return {name: np.empty(shape_of(name, sizes), np.float32) for name in OUTPUTS}


def _check_names(kind: str, given: Mapping[str, Array], expected: Mapping[str, Axes]) -> None:
    missing, unknown = expected.keys() - given.keys(), given.keys() - expected.keys()
    if missing or unknown:
        got = f"missing {sorted(missing)}, unknown {sorted(unknown)}"
        raise _mistake(f"{kind} of a step", got, ", ".join(expected))


def _check_array(name: str, array: Array, kind: str, axes: Axes, sizes: dict[str, int]) -> None:
    """Check one array; a letter that is new in `sizes` takes its size from this array."""
    fits = array.dtype == kind and array.ndim == len(axes) and array.flags.c_contiguous
    if fits:
        for axis, size in zip(axes, array.shape, strict=True):
            expected = sizes.setdefault(axis, size) if isinstance(axis, str) else axis
            fits = fits and size == expected
    if not fits:
        layout = "" if array.flags.c_contiguous else ", not C-contiguous"
        shape = ", ".join(f"{a}={sizes[a]}" if a in sizes else str(a) for a in axes)
        got = f"{array.dtype} {list(array.shape)}{layout}"
        raise _mistake(name, got, f"{kind} [{shape}], C-contiguous")


def _mistake(name: str, got: object, expected: str) -> ValueError:
    return ValueError(f"{name} | got {got} | expected {expected}")
