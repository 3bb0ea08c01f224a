"""diffusers' own Safe Latent Diffusion on a tiny random model, and our bundle of the same model."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipelineSafe,
    UniPCMultistepScheduler,
)
from numpy.typing import NDArray
from transformers import CLIPTokenizer

from oracles.models import Kind, save_diffusers_directory
from sld_edge.export import ExportSettings, export_bundle
from sld_edge.runtime import Pipeline, Safety

CHECKPOINT = Path(__file__).parents[2] / "benchmarks" / "miniworld" / "checkpoint"
VOCABULARY = 1000  # above every id of the miniature's tokenizer

# Our samplers, as diffusers spells them.
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {}),
    "pndm": (PNDMScheduler, {"skip_prk_steps": True}),  # as every Stable Diffusion config says
    "euler": (EulerDiscreteScheduler, {}),
    "euler-a": (EulerAncestralDiscreteScheduler, {}),
    "dpm++2m": (DPMSolverMultistepScheduler, {}),
    "dpm++2m-karras": (DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "lcm": (LCMScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
    "lms": (LMSDiscreteScheduler, {}),
}


def tokenizer(length: int = 77) -> CLIPTokenizer:
    """Return a real CLIP-style tokenizer: the miniature's, at SD's length."""
    return CLIPTokenizer.from_pretrained(CHECKPOINT / "tokenizer", model_max_length=length)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The oracle and ours, of one model."""

    oracle: Any
    ours: Pipeline


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run, for both sides; `size` is width and height in pixels."""

    sampler: str
    safety: Safety
    steps: int
    seed: int
    prompt: str = "a red star at a party"
    concept: str = "skull, death, horror"
    negative_prompt: str | None = None
    guidance_scale: float = 7.5
    size: int = 64


@dataclass(frozen=True, kw_only=True)
class Trace:
    """An image, uint8 [H,W,3], and the latents after each UNet call, float32 [N,4,h,w]."""

    image: NDArray[np.uint8]
    latents: NDArray[np.float32]


def pair_of(kind: Kind, folder: Path) -> Pair:
    """Make a tiny random model, load it in diffusers, export it and load the bundle."""
    source = save_diffusers_directory(
        folder / "model", kind, tokenizer=tokenizer(), vocab_size=VOCABULARY
    )
    settings = ExportSettings(
        model=str(source), output=folder / "bundle", precision="fp32", preset="medium"
    )
    ours = Pipeline.load(export_bundle(settings), provider="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = StableDiffusionPipelineSafe.from_pretrained(
            source, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    oracle.set_progress_bar_config(disable=True)
    return Pair(oracle=oracle, ours=ours)


def oracle_trace(pair: Pair, case: Case) -> Trace:
    """Run diffusers' pipeline."""
    scheduler, changes = SCHEDULERS[case.sampler]
    oracle = pair.oracle
    config = {**pair.ours.bundle.manifest.scheduler}
    config["prediction_type"] = pair.ours.bundle.manifest.prediction_type
    oracle.scheduler = scheduler.from_config(config, **changes)
    oracle.safety_concept = case.concept
    seen: list[NDArray[np.float32]] = []
    image = oracle(
        case.prompt,
        height=case.size,
        width=case.size,
        num_inference_steps=case.steps,
        guidance_scale=case.guidance_scale,
        negative_prompt=case.negative_prompt,
        generator=torch.Generator().manual_seed(case.seed),
        output_type="pil",
        sld_guidance_scale=case.safety.scale,
        sld_warmup_steps=case.safety.warmup_steps,
        sld_threshold=case.safety.threshold,
        sld_momentum_scale=case.safety.momentum_scale,
        sld_mom_beta=case.safety.momentum_beta,
        callback=lambda _i, _t, latents: seen.append(latents[0].numpy().copy()),
    ).images[0]
    return Trace(image=np.asarray(image), latents=np.stack(seen))


def our_trace(pair: Pair, case: Case) -> Trace:
    """Run ours with the same settings."""
    seen: list[NDArray[np.float32]] = []
    result = pair.ours(
        case.prompt,
        height=case.size,
        width=case.size,
        steps=case.steps,
        sampler=case.sampler,
        safety=case.safety,
        safety_concept=case.concept if case.safety.acts else None,
        guidance_scale=case.guidance_scale,
        negative_prompt=case.negative_prompt,
        seed=case.seed,
        safety_units="raw",  # as diffusers takes them
        callback=lambda step: seen.append(step.latents[0]),
    )
    return Trace(image=np.asarray(result.images[0]), latents=np.stack(seen))


def disagreement(ours: Trace, oracle: Trace) -> tuple[float, int]:
    """Return the largest relative difference of a call's latents, and the largest of a pixel."""
    # diffusers reports PNDM's first call together with its second.
    assert len(ours.latents) - len(oracle.latents) in (0, 1)
    norms = [
        float(np.linalg.norm(a - b) / np.linalg.norm(b))
        for a, b in zip(ours.latents[-len(oracle.latents) :], oracle.latents, strict=True)
    ]
    pixels = np.abs(ours.image.astype(int) - oracle.image.astype(int))
    return max(norms), int(pixels.max())
