"""The safe step in NumPy: what the native code is compared with, and what runs without it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sld_edge.cpp_ext.arguments import Array, Combine


def safe_step(feeds: Mapping[str, Array], combine: Combine = "strongest") -> dict[str, Array]:
    """Compute the outputs of `sld_edge.cpp_ext.safe_step`, in the latents' precision."""
    latents, history = feeds["latents"], feeds["history"]
    uncond, text, concepts = (
        feeds[f"noise_pred_{branch}"].astype(latents.dtype, copy=False)
        for branch in ("uncond", "text", "safety")
    )
    scale, threshold, momentum_scale, beta, active = feeds["safety"].T[..., None, None, None]
    guidance_scale = feeds["guidance_scale"][:, None, None, None]
    p, q, a, b0, *past, s, c_in_next = feeds["row"]

    with np.errstate(all="ignore"):  # `finite` tells
        d = text - concepts
        mu = np.where(d >= threshold, 0, np.minimum(np.abs(d) * scale, 1))
        edits = mu * (concepts - uncond)
        gamma = _combined(edits, combine) + momentum_scale * feeds["momentum"]
        momentum = beta * feeds["momentum"] + (1 - beta) * gamma

        guided = uncond + guidance_scale * (text - uncond)
        edit = guidance_scale * active * gamma
        kept = p * latents + q * (guided - edit)
        moved = a * latents + b0 * kept
        moved = moved + sum(weight * old for weight, old in zip(past, history, strict=True))
        moved = moved + s * feeds["noise"]

        edited = (mu > 0).any(axis=0).mean(axis=(1, 2, 3), dtype=latents.dtype)
        below = _norm(guided)
        return {
            "latents_next": moved,
            "unet_latents": c_in_next * moved,
            "momentum_next": momentum,
            "history_next": np.concatenate([kept[None], history[:3]]),
            "edit_map_next": feeds["edit_map"] + np.abs(edit).mean(axis=1),
            "share": active[:, 0, 0, 0] * edited,
            "strength": _ratio(_norm(edit), below),
            "concept_strength": _ratio(_norm(guidance_scale * active * edits), below),
            "finite": _finite(moved, uncond, text, *concepts).astype(latents.dtype),
        }


def _combined(edits: Array, combine: Combine) -> Array:
    """Make one edit [B,4,h,w] of the concepts' [n,B,4,h,w]."""
    if combine == "sum":
        return np.asarray(edits.sum(axis=0))
    highest, lowest = edits.max(axis=0), edits.min(axis=0)
    return np.asarray(np.where(highest + lowest >= 0, highest, lowest))


def _norm(values: Array) -> Array:
    """Euclidean, over [4,h,w]."""
    return np.asarray(np.sqrt(np.square(values).sum(axis=(-3, -2, -1))))


def _ratio(above: Array, below: Array) -> Array:
    """Nothing to compare with gives 0."""
    return np.asarray(np.where(below == 0, 0, above / np.where(below == 0, 1, below)))


def _finite(latents: Array, *predictions: Array) -> Array:
    """1; 0 where the latents are not finite; -1 where a prediction was not."""
    whole, *fed = (np.isfinite(x).all(axis=(1, 2, 3)) for x in (latents, *predictions))
    return np.where(np.logical_and.reduce(fed), whole, -1)
