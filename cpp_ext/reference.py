"""The safe step in NumPy: the reference for native code, and the fallback without it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sld_edge.cpp_ext.arguments import Array


def safe_step(feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Compute the outputs of `sld_edge.cpp_ext.safe_step`, in the precision of the latents."""
    latents, momentum, history = feeds["latents"], feeds["momentum"], feeds["history"]
    uncond, text, concepts = (
        feeds[f"noise_pred_{branch}"].astype(latents.dtype, copy=False)
        for branch in ("uncond", "text", "safety")
    )
    scale, threshold, momentum_scale, beta, active = feeds["safety"].T[..., None, None, None]
    guidance_scale = feeds["guidance_scale"][:, None, None, None]
    p, q, a, b0, *past, s, c_in_next, unit = feeds["row"]

    with np.errstate(all="ignore"):  # `finite` reports NaN and infinity
        d = unit * (text - concepts)
        mu = np.where(d >= threshold, 0, np.minimum(np.abs(d) * scale, 1))
        edits = mu * (unit * (concepts - uncond))
        gamma = _strongest(edits) + momentum_scale * momentum

        guided = uncond + guidance_scale * (text - uncond)
        strength = guidance_scale * active
        edit = strength * gamma / unit
        kept = p * latents + q * (guided - edit)
        moved = a * latents + b0 * kept
        moved = moved + sum(weight * old for weight, old in zip(past, history, strict=True))
        moved = moved + s * feeds["noise"]

        edited = (mu > 0).any(axis=0).mean(axis=(1, 2, 3), dtype=latents.dtype)
        norm = _norm(guided)
        return {
            "latents_next": moved,
            "unet_latents": c_in_next * moved,
            "momentum_next": beta * momentum + (1 - beta) * gamma,
            "history_next": np.concatenate([kept[None], history[:-1]]),
            "edit_map_next": feeds["edit_map"] + np.abs(edit).mean(axis=1),
            "share": active[:, 0, 0, 0] * edited,
            "strength": _ratio(_norm(edit), norm),
            "concept_strength": _ratio(_norm(strength * edits / unit), norm),
            "finite": _finite(moved, uncond, text, *concepts).astype(latents.dtype),
        }


def _strongest(edits: Array) -> Array:
    """Reduce the concepts' edits [n,B,4,h,w]; of opposite edits of one size, take the positive."""
    highest, lowest = edits.max(axis=0), edits.min(axis=0)
    return np.asarray(np.where(highest + lowest >= 0, highest, lowest))


def _norm(values: Array) -> Array:
    """Return the Euclidean norm over [4,h,w]."""
    return np.asarray(np.sqrt(np.square(values).sum(axis=(-3, -2, -1))))


def _ratio(norm: Array, below: Array) -> Array:
    """Return norm / below, and 0 where below is 0."""
    return np.asarray(np.where(below == 0, 0, norm / np.where(below == 0, 1, below)))


def _finite(latents: Array, *predictions: Array) -> Array:
    """Return -1 where a prediction is not finite, else 0 where the latents are not, else 1."""
    whole, *each = (np.isfinite(x).all(axis=(1, 2, 3)) for x in (latents, *predictions))
    return np.where(np.logical_and.reduce(each), whole, -1)
