"""The denoising loop: a generator that knows neither samplers nor what watches it.

Two graphs a call: the UNet on the branches that are needed, then `guidance`, which does Safe Latent
Diffusion, classifier-free guidance and the sampler's row. Progress, previews, timing and reports
are consumers; closing the generator stops it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sld_edge.engines.base import Engine
from sld_edge.engines.errors import NumericsError
from sld_edge.runtime.plan import ImagePlan
from sld_edge.runtime.random import NoiseSource
from sld_edge.runtime.samplers import SamplerTable
from sld_edge.runtime.samplers.table import HISTORY

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one UNet call did. B images; arrays belong to the receiver.

    Attributes:
        index: the call, from 0.
        calls: how many there are.
        timestep: the training timestep of the call.
        branches: UNet branches that were computed, 1 to 3.
        latents: float32 [B,4,h,w], after the call, unscaled.
        share: float32 [B], share of the latent's elements that safety edited, 0 to 1.
        strength: float32 [B], norm of the edit relative to that of the plainly guided noise_pred.
        edit_map: float32 [B,h,w], where safety acted, summed over the calls so far.
    """

    index: int
    calls: int
    timestep: float
    branches: int
    latents: Floats
    share: Floats
    strength: Floats
    edit_map: Floats


def denoise(
    *,
    unet: Engine,
    guidance: Engine,
    table: SamplerTable,
    images: Sequence[ImagePlan],
    context: Floats,
    latents: Floats,
    noise: Sequence[NoiseSource],
    together: bool,
) -> Generator[Step, None, None]:
    """Denoise B images, one Step a UNet call.

    Args:
        unet: engine of the `unet` graph.
        guidance: engine of the `guidance` graph.
        table: the sampler.
        images: B plans, whose guidance scale and safety are used.
        context: float32 [3*B,L,C], all unconditional, all prompts, all safety concepts.
        latents: float32 [B,4,h,w], starting noise of unit variance.
        noise: B sources of fresh noise, for samplers that add some.
        together: run the branches in one batch; one after another they take less memory.

    Raises:
        NumericsError: NaN or infinity, named by component and call.
    """
    count, channels, height, width = latents.shape
    scale = np.array([max(image.guidance_scale, 1.0) for image in images], np.float32)
    rows = table.rows()
    state = {
        "latents": np.ascontiguousarray(latents * np.float32(table.init_noise_sigma)),
        "momentum": np.zeros_like(latents),
        "history": np.zeros((HISTORY, *latents.shape), np.float32),
        "edit_map": np.zeros((count, height, width), np.float32),
    }
    unet_latents = state["latents"] * np.float32(table.c_in[0])
    silence = np.zeros_like(latents)
    for index in range(table.calls):
        branches = _branches_needed(images, index)
        predictions = _predict(
            unet, unet_latents, float(table.timesteps[index]), context, branches, together
        )
        fresh = silence
        if table.s[index] > 0:
            shape = (1, channels, height, width)
            fresh = np.concatenate([source.normal(shape) for source in noise])
        out = guidance.run(
            {
                **dict(zip(_PREDICTIONS, predictions, strict=True)),
                **state,
                "noise": fresh,
                "row": rows[index],
                "guidance_scale": scale,
                "safety": np.array([_safety_row(image, index) for image in images], np.float32),
            }
        )
        state = {name: out[f"{name}_next"] for name in state}
        unet_latents = out["unet_latents"]
        if not out["finite"].all():
            _refuse(predictions, index, table.calls)
        yield Step(
            index=index,
            calls=table.calls,
            timestep=float(table.timesteps[index]),
            branches=branches,
            latents=state["latents"],
            share=out["share"],
            strength=out["strength"],
            edit_map=state["edit_map"],
        )


_PREDICTIONS = ("noise_pred_uncond", "noise_pred_text", "noise_pred_safety")


def _branches_needed(images: Sequence[ImagePlan], index: int) -> int:
    """Count the branches that can change this call's or a later call's result: 3, 2 or 1."""
    if any(
        image.safety.acts
        # In the warm-up the branch matters only for the momentum it builds up.
        and (index >= image.safety.warmup_steps or image.safety.momentum_scale > 0)
        for image in images
    ):
        return 3
    return 2 if any(image.guidance_scale > 1 for image in images) else 1


def _safety_row(image: ImagePlan, index: int) -> tuple[float, float, float, float, float]:
    safety = image.safety
    active = float(safety.acts and index >= safety.warmup_steps)
    return (
        safety.scale,
        safety.threshold,
        safety.momentum_scale,
        safety.momentum_beta,
        active,
    )


def _predict(
    unet: Engine,
    latents: Floats,
    timestep: float,
    context: Floats,
    branches: int,
    together: bool,
) -> tuple[Floats, Floats, Floats]:
    """Run the needed branches; one that is not is given another's place, where it has no effect."""
    count = len(latents)
    first = 1 if branches == 1 else 0  # a single branch is the prompt's
    wanted = context[first * count : (first + branches) * count]
    feeds = {"latents": latents, "timestep": np.full(count, timestep, np.float32)}
    parts: list[Floats]
    if together:
        joined = unet.run({**feeds, "context": wanted})["noise_pred"]
        parts = [joined[k * count : (k + 1) * count] for k in range(branches)]
    else:
        parts = [
            unet.run({**feeds, "context": wanted[k * count : (k + 1) * count]})["noise_pred"]
            for k in range(branches)
        ]
    uncond, text = parts[0], parts[min(1, branches - 1)]
    return uncond, text, parts[2] if branches == 3 else uncond


def _refuse(predictions: Sequence[Floats], index: int, calls: int) -> None:
    component = "guidance" if all(np.isfinite(p).all() for p in predictions) else "unet"
    advice = (
        "export with --precision fp32, or check the weights"
        if component == "unet"
        else "lower the guidance scale or the safety scale"
    )
    raise NumericsError(
        f"{component}: NaN or infinity at call {index + 1} of {calls}, no image was made",
        do=advice,
    )
