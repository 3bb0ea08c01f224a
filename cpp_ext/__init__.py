"""The safe step as one function: native where it was built, NumPy elsewhere. See docs/native.md."""

from __future__ import annotations

from collections.abc import Mapping

from sld_edge.cpp_ext import reference
from sld_edge.cpp_ext.arguments import (
    COMBINATIONS,
    Array,
    Combine,
    check_choices,
    check_inputs,
    check_outputs,
    check_overlap,
    empty_outputs,
)

try:
    import sld_edge.cpp_ext._kernels as _kernels
except ModuleNotFoundError as missing:
    if missing.name != "sld_edge.cpp_ext._kernels":
        raise
    HAVE_NATIVE = False
else:
    HAVE_NATIVE = True

__all__ = ["HAVE_NATIVE", "empty_outputs", "safe_step"]


def safe_step(
    feeds: Mapping[str, Array],
    *,
    combine: Combine = "strongest",
    threads: int = 1,
    out: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """Do Safe Latent Diffusion, guidance and the sampler's row for one UNet call.

    The names are the `guidance` graph's. B images, n concepts, latents [4,h,w]; C-contiguous.

    Args:
        feeds: noise_pred_uncond, noise_pred_text [B,4,h,w] and noise_pred_safety [n,B,4,h,w], all
            float32 or all float16; float32: latents, momentum, noise [B,4,h,w]; history
            [4,B,4,h,w], newest first; edit_map [B,h,w]; row [10]; guidance_scale [B]; safety [B,5].
        combine: how the concepts' edits become one, element by element: the strongest, or the sum.
        threads: native code's; the results do not depend on it.
        out: arrays of `empty_outputs` to write to; they may not overlap each other or `feeds`.

    Returns:
        float32 latents_next, unet_latents, momentum_next [B,4,h,w], history_next [4,B,4,h,w],
        edit_map_next [B,h,w], share, strength [B], concept_strength [n,B], and finite [B]: 1 where
        all is, 0 where only latents_next is not, -1 where a prediction is not. The caller's.

    Raises:
        ValueError: an array that is missing, or of another type, size or layout; an unknown
            `combine`; outputs that overlap.

    Source: SLD, arXiv 2211.05105, equations 3 to 8; several concepts are ours.
    """
    sizes = check_inputs(feeds)
    check_choices(combine, threads)
    if out is None:
        outputs = empty_outputs(sizes)
    else:
        outputs = dict(out)
        check_outputs(outputs, sizes)
    if HAVE_NATIVE:
        code = COMBINATIONS.index(combine)
        _kernels.safe_step(**feeds, **outputs, combine=code, threads=threads)
    else:
        check_overlap(outputs, feeds)
        for name, array in reference.safe_step(feeds, combine).items():
            outputs[name][...] = array
    return outputs
