"""The arrays of a safe step: names, types, shapes; checked alike for native code and NumPy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Combine = Literal["strongest", "sum"]
COMBINATIONS: tuple[Combine, ...] = get_args(Combine)  # in the order of the C header
MAX_CONCEPTS, MAX_THREADS = 64, 1024  # the C header's

_IMAGE: tuple[int | str, ...] = ("B", 4, "h", "w")
_PREDICTIONS = ("noise_pred_uncond", "noise_pred_text", "noise_pred_safety")
_INPUTS: dict[str, tuple[int | str, ...]] = {
    "noise_pred_uncond": _IMAGE,
    "noise_pred_text": _IMAGE,
    "noise_pred_safety": ("n", *_IMAGE),
    "latents": _IMAGE,
    "momentum": _IMAGE,
    "history": (4, *_IMAGE),
    "noise": _IMAGE,
    "edit_map": ("B", "h", "w"),
    "row": (10,),
    "guidance_scale": ("B",),
    "safety": ("B", 5),
}
_OUTPUTS: dict[str, tuple[int | str, ...]] = {
    "latents_next": _IMAGE,
    "unet_latents": _IMAGE,
    "momentum_next": _IMAGE,
    "history_next": (4, *_IMAGE),
    "edit_map_next": ("B", "h", "w"),
    "share": ("B",),
    "strength": ("B",),
    "concept_strength": ("n", "B"),
    "finite": ("B",),
}


def check_inputs(feeds: Mapping[str, Array]) -> dict[str, int]:
    """Return the sizes B, n, h and w of a step's inputs.

    Raises:
        ValueError: a name too many or too few, or an array of another type, shape or layout.
    """
    _check_names("inputs", feeds, _INPUTS)
    sizes: dict[str, int] = {}
    kind = "float16" if feeds["noise_pred_uncond"].dtype == np.float16 else "float32"
    for name, shape in _INPUTS.items():
        _check_array(name, feeds[name], kind if name in _PREDICTIONS else "float32", shape, sizes)
    if min(sizes.values()) < 1 or sizes["n"] > MAX_CONCEPTS:
        raise ValueError(
            _message("sizes of a step", sizes, f"1 or more, and n at most {MAX_CONCEPTS}")
        )
    return sizes


def check_outputs(outputs: Mapping[str, Array], sizes: Mapping[str, int]) -> None:
    """Check arrays to write to.

    Raises:
        ValueError: as for inputs; also one that cannot be written.
    """
    _check_names("outputs", outputs, _OUTPUTS)
    for name, shape in _OUTPUTS.items():
        _check_array(name, outputs[name], "float32", shape, dict(sizes))
        if not outputs[name].flags.writeable:
            raise ValueError(_message(name, "a read-only array", "one that can be written"))


def check_overlap(outputs: Mapping[str, Array], feeds: Mapping[str, Array]) -> None:
    """Check what native code checks by itself.

    Raises:
        ValueError: an output that overlaps an input or another output.
    """
    others = dict(feeds)
    for name, array in outputs.items():
        for other, memory in others.items():
            if np.may_share_memory(array, memory):
                raise ValueError(_message(name, f"memory of {other}", "memory of its own"))
        others[name] = array


def check_choices(combine: str, threads: int) -> None:
    """Check what is not an array.

    Raises:
        ValueError: no such way to combine, or a number of threads that cannot be.
    """
    if combine not in COMBINATIONS:
        raise ValueError(_message("combine", repr(combine), " or ".join(COMBINATIONS)))
    if not 1 <= threads <= MAX_THREADS:
        raise ValueError(_message("threads", threads, f"1 to {MAX_THREADS}"))


def empty_outputs(sizes: Mapping[str, int]) -> dict[str, Array]:
    """Return uninitialised float32 arrays for a step's outputs, for sizes B, n, h and w."""
    return {
        name: np.empty([sizes[a] if isinstance(a, str) else a for a in shape], np.float32)
        for name, shape in _OUTPUTS.items()
    }


def _check_names(what: str, given: Mapping[str, Array], wanted: Mapping[str, object]) -> None:
    if given.keys() != wanted.keys():
        missing = sorted(wanted.keys() - given.keys())
        unknown = sorted(given.keys() - wanted.keys())
        got = f"none named {missing}" if missing else f"unknown {unknown}"
        raise ValueError(_message(f"{what} of a step", got, ", ".join(wanted)))


def _check_array(
    name: str, array: Array, kind: str, shape: tuple[int | str, ...], sizes: dict[str, int]
) -> None:
    """Check one array, and note the sizes that it is the first to have."""
    fits = array.dtype == kind and array.ndim == len(shape) and array.flags.c_contiguous
    if fits:
        for axis, size in zip(shape, array.shape, strict=True):
            wanted = sizes.setdefault(axis, size) if isinstance(axis, str) else axis
            fits = fits and size == wanted
    if not fits:
        layout = "" if array.flags.c_contiguous else ", not C-contiguous"
        axes = [f"{a}={sizes[a]}" if a in sizes else str(a) for a in shape]
        expected = f"{kind} [{', '.join(axes)}], C-contiguous"
        raise ValueError(_message(name, f"{array.dtype} {list(array.shape)}{layout}", expected))


def _message(what: str, got: object, expected: str) -> str:
    return f"{what} | got {got} | expected {expected}"
