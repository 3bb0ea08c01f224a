"""The interface of the guidance graph: names, shapes and columns, in one place.

The exporter writes the graph with these names and shapes; both loops and the self-test use them;
`cpp_ext/include/sld_edge.h` has them in C.
`export/graphs/guidance.py` has the formulas.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

HISTORY: Final = 4  # past outputs that a sampler can use
PREDICTIONS: Final = ("noise_pred_uncond", "noise_pred_text", "noise_pred_safety")
STATE: Final = ("latents", "momentum", "history", "edit_map")  # the graph returns each as NAME_next
NUMBERS: Final = ("timestep", "row", "safety")  # new values at every call
FIGURES: Final = ("share", "strength", "concept_strength", "finite")  # measured at every call

# Columns of `row`: the sampler's numbers for one call (`samplers.table`), the factor of the next
# UNet input, and the difference in noise for a difference of 1 in the UNet's output.
ROW: Final = ("p", "q", "a", "b0", "b1", "b2", "b3", "b4", "s", "c_in_next", "noise_unit")
# Columns of `safety`, one row for each image; `active` is 1 if the call edits, else 0.
SAFETY: Final = ("scale", "threshold", "momentum_scale", "momentum_beta", "active")

Axes = tuple[int | str, ...]
_IMAGE: Final[Axes] = ("B", 4, "h", "w")

# Shapes by name: B images, n safety concepts, latents of h x w cells. All float32.
INPUTS: Final[Mapping[str, Axes]] = {
    "noise_pred_uncond": _IMAGE,
    "noise_pred_text": _IMAGE,
    "noise_pred_safety": ("n", *_IMAGE),
    "latents": _IMAGE,
    "momentum": _IMAGE,
    "history": (HISTORY, *_IMAGE),
    "noise": _IMAGE,
    "edit_map": ("B", "h", "w"),
    "row": (len(ROW),),
    "guidance_scale": ("B",),
    "safety": ("B", len(SAFETY)),
}
OUTPUTS: Final[Mapping[str, Axes]] = {
    "latents_next": _IMAGE,
    "unet_latents": _IMAGE,
    "momentum_next": _IMAGE,
    "history_next": (HISTORY, *_IMAGE),
    "edit_map_next": ("B", "h", "w"),
    "share": ("B",),
    "strength": ("B",),
    "concept_strength": ("n", "B"),
    "finite": ("B",),
}


def shape_of(name: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the shape of an input or output, with the values of B, n, h and w from `sizes`."""
    axes = {**INPUTS, **OUTPUTS}[name]
    return tuple(sizes[axis] if isinstance(axis, str) else axis for axis in axes)
