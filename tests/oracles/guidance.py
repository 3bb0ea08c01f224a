"""A NumPy twin of the `guidance` graph, with the mistakes that one could make in it.

The right twin must pass the parity test, each mutant must fail it (runtime/test_mutants.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import numpy as np

from sld_edge.engines.base import Array, TensorSpec

Mistake = Literal[
    "swapped-branches",
    "text-and-safety-swapped",
    "greater-for-greater-or-equal",
    "absolute-distance",
    "momentum-before-the-gate",
    "momentum-without-itself",
    "momentum-only-when-active",
    "edit-not-scaled-by-guidance",
    "edit-added",
    "history-oldest-first",
]
MISTAKES: tuple[Mistake, ...] = get_args(Mistake)


def guidance(feeds: Mapping[str, Array], mistake: Mistake | None = None) -> dict[str, Array]:
    """Compute the graph's outputs from its inputs, in the inputs' precision."""
    uncond, text = feeds["noise_pred_uncond"], feeds["noise_pred_text"]
    concept = feeds["noise_pred_safety"]  # [n,B,4,h,w]
    if mistake == "swapped-branches":
        uncond, text = text, uncond
    if mistake == "text-and-safety-swapped":
        text, concept = concept[0], text[None]
    latents, momentum, history = feeds["latents"], feeds["momentum"], feeds["history"]
    scale, threshold, momentum_scale, beta, active = feeds["safety"].T[..., None, None, None]
    guidance_scale = feeds["guidance_scale"][:, None, None, None]
    p, q, a, b0, b1, b2, b3, b4, s, c_in, unit = feeds["row"]

    distance = unit * (text - concept)
    direction = unit * (concept - uncond)  # in noise, as the momentum is
    compared = np.abs(distance) if mistake == "absolute-distance" else distance
    unedited = (
        compared > threshold
        if mistake == "greater-for-greater-or-equal"
        else (compared >= threshold)
    )
    mu = np.where(unedited, 0, np.minimum(np.abs(distance) * scale, 1)).astype(latents.dtype)
    if mistake == "momentum-before-the-gate":
        gamma = (mu * (direction + momentum_scale * momentum))[0]
    else:
        gamma = strongest(mu * direction) + momentum_scale * momentum
    kept_edit = gamma - momentum_scale * momentum
    if mistake != "momentum-without-itself":
        kept_edit = gamma
    momentum_next = beta * momentum + (1 - beta) * kept_edit
    if mistake == "momentum-only-when-active":
        momentum_next = np.where(active > 0, momentum_next, momentum)
    edit = active * gamma / unit
    if mistake == "edit-added":
        edit = -edit
    plain = uncond + guidance_scale * (text - uncond)
    if mistake == "edit-not-scaled-by-guidance":
        eps = plain - edit
    else:
        eps = uncond + guidance_scale * (text - uncond - edit)

    kept = p * latents + q * eps
    past = history[::-1] if mistake == "history-oldest-first" else history
    new = a * latents + b0 * kept + feeds["noise"] * s
    new = new + sum(b * m for b, m in zip((b1, b2, b3, b4), past, strict=True))
    change = guidance_scale * edit
    own = guidance_scale * active * mu * direction / unit
    norms = [np.sqrt((x * x).sum(axis=(-3, -2, -1))) for x in (change, plain, own)]
    return {
        "latents_next": new,
        "unet_latents": c_in * new,
        "momentum_next": momentum_next,
        "history_next": np.concatenate([kept[None], history[:3]]),
        "edit_map_next": feeds["edit_map"] + np.abs(change).mean(axis=1),
        "share": active[:, 0, 0, 0]
        * (mu.max(axis=0) > 0).mean(axis=(1, 2, 3)).astype(latents.dtype),
        "strength": _ratio(norms[0], norms[1]),
        "concept_strength": _ratio(norms[2], norms[1]),
        "finite": _finite(new, (uncond, text, *concept)).astype(latents.dtype),
    }


def strongest(edits: Array) -> Array:
    """Of each element of [n,...] the largest in size, with its sign; if tied, the positive."""
    ordered = np.sort(edits, axis=0)
    return np.where(np.abs(ordered[-1]) >= np.abs(ordered[0]), ordered[-1], ordered[0])


def _ratio(above: Array, below: Array) -> Array:
    below = np.broadcast_to(below, above.shape)
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _finite(latents: Array, predictions: tuple[Array, ...]) -> Array:
    """1; 0 where the latents are not finite; -1 where a prediction was not."""
    whole, *fed = (np.isfinite(x).all(axis=(1, 2, 3)) for x in (latents, *predictions))
    return np.where(np.logical_and.reduce(fed), whole, -1)


class TwinEngine:
    """The twin as an engine, in place of the graph."""

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()

    def __init__(self, mistake: Mistake | None = None) -> None:
        self.mistake = mistake

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return {
            name: np.asarray(value, np.float32)
            for name, value in guidance(feeds, self.mistake).items()
        }

    def __enter__(self) -> TwinEngine:
        return self

    def __exit__(self, *exc: Any) -> None: ...
