"""Little models of every family, and diffusers' pipelines and a loop of the reference's formulas.

diffusers has no safe pipeline for SDXL and LCM: there the oracle is a loop of its UNet and
schedulers with the formulas of Safe Latent Diffusion as its reference implementation has them.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from numpy.typing import NDArray

from oracles.models import (
    POOLED_WIDTH,
    SD1_SCHEDULER,
    TEXT_WIDTH,
    UnetKind,
    tiny_pooled_text_encoder,
    tiny_text_encoder,
    tiny_unet,
    tiny_vae,
)
from oracles.safe_pipeline import SCHEDULERS, VOCABULARY, tokenizer
from sld_edge.export import ExportSettings, export_bundle
from sld_edge.runtime import Pipeline, Safety

Array = NDArray[np.float32]
WIDE = 2 * TEXT_WIDTH  # of SDXL's second text encoder
assert POOLED_WIDTH != WIDE


@dataclass(frozen=True, kw_only=True)
class Model:
    """diffusers' pipeline and ours, of one model; `xl` where it has two text encoders."""

    oracle: Any
    ours: Pipeline
    xl: bool


def save_model(root: Path, kind: UnetKind, *, seed: int = 0, **changes: Any) -> Path:
    """Save a whole checkpoint, as diffusers does; `changes` go to model_index.json."""
    xl = "sdxl" in kind or kind == "plain-middle"
    width = TEXT_WIDTH + WIDE if xl else TEXT_WIDTH
    models: dict[str, Any] = {
        "unet": tiny_unet(kind, seed=seed, text_width=width),
        "text_encoder": tiny_text_encoder(seed=seed, vocab_size=VOCABULARY),
        "vae": tiny_vae(seed=seed),
    }
    tokenizer().save_pretrained(root / "tokenizer")
    if xl:
        models["text_encoder_2"] = tiny_pooled_text_encoder(
            seed=seed + 1, text_width=WIDE, vocab_size=VOCABULARY, eos_token_id=2
        )
        second = tokenizer()
        second.pad_token = "!"
        second.save_pretrained(root / "tokenizer_2")
    for name, model in models.items():
        model.save_pretrained(root / name)
    scheduler = dict(SD1_SCHEDULER)
    if "lcm" in kind:
        scheduler |= {"_class_name": "LCMScheduler", "original_inference_steps": 50}
    (root / "scheduler").mkdir(parents=True)
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {"_class_name": f"StableDiffusion{'XL' if xl else ''}Pipeline", **changes}
    (root / "model_index.json").write_text(json.dumps(index))
    return root


def model_of(
    root: Path,
    kind: UnetKind,
    *,
    seed: int = 0,
    export: dict[str, Any] | None = None,
    **changes: Any,
) -> Model:
    """Save a checkpoint, open it in diffusers, and export it with settings `export`."""
    source = save_model(root / "model", kind, seed=seed, **changes)
    settings = ExportSettings(
        model=str(source),
        output=root / "bundle",
        **{"precision": "fp32", "preset": "medium", **(export or {})},
    )
    ours = Pipeline.load(export_bundle(settings), provider="cpu")
    return Model(oracle=oracle_of(source, kind, **changes), ours=ours, xl=len(ours_texts(ours)) > 1)


def ours_texts(pipeline: Pipeline) -> list[str]:
    return list(pipeline.bundle.manifest.texts)


def oracle_of(source: Path, kind: UnetKind, **changes: Any) -> Any:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel.from_pretrained(source / "unet"),
        "vae": AutoencoderKL.from_pretrained(source / "vae"),
        "text_encoder": CLIPTextModel.from_pretrained(source / "text_encoder"),
        "tokenizer": CLIPTokenizer.from_pretrained(source / "tokenizer"),
        "scheduler": LCMScheduler.from_pretrained(source / "scheduler"),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if (source / "text_encoder_2").exists():
            parts["text_encoder_2"] = CLIPTextModelWithProjection.from_pretrained(
                source / "text_encoder_2"
            )
            parts["tokenizer_2"] = CLIPTokenizer.from_pretrained(source / "tokenizer_2")
            pipeline: Any = StableDiffusionXLPipeline(
                **parts,
                add_watermarker=False,
                force_zeros_for_empty_prompt=changes.get("force_zeros_for_empty_prompt", True),
            )
        else:
            parts |= {"safety_checker": None, "feature_extractor": None}
            kinds = LatentConsistencyModelPipeline if kind == "lcm" else StableDiffusionPipeline
            pipeline = kinds(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def use_sampler(model: Model, sampler: str) -> None:
    """Give diffusers' pipeline the scheduler of one of our samplers."""
    scheduler, changes = SCHEDULERS[sampler]
    manifest = model.ours.bundle.manifest
    config = {**manifest.scheduler, "prediction_type": manifest.prediction_type}
    model.oracle.scheduler = scheduler.from_config(config, **changes)


def latents_of_pipeline(
    model: Model, prompt: str, *, sampler: str, seed: int, **call: Any
) -> Array:
    """Return the last latents of diffusers' own pipeline."""
    use_sampler(model, sampler)
    generator = torch.Generator().manual_seed(seed)
    out = model.oracle(prompt, generator=generator, output_type="latent", **call)
    latents: Array = out.images.numpy()
    return latents


def latents_of_loop(
    model: Model,
    prompt: str,
    *,
    sampler: str,
    seed: int,
    steps: int,
    guidance_scale: float,
    safety: Safety,
    concept: str,
    negative_prompt: str | None = None,
    height: int = 64,
    width: int = 64,
    time_ids: tuple[int, ...] | None = None,
) -> Array:
    """Return the last latents of the reference's loop (SLD, section 3), one image."""
    use_sampler(model, sampler)
    oracle, scheduler = model.oracle, model.oracle.scheduler
    texts = [_embedding(model, text) for text in (negative_prompt, prompt, concept)]
    context = torch.cat([states for states, _ in texts])
    more: dict[str, Any] = {}
    if model.xl:
        ids = time_ids if time_ids is not None else (height, width, 0, 0, height, width)
        more["added_cond_kwargs"] = {
            "text_embeds": torch.cat([pooled for _, pooled in texts]),
            "time_ids": torch.tensor([ids] * 3, dtype=torch.float32),
        }
    embedded = oracle.unet.config.time_cond_proj_dim
    if embedded is not None:
        w = torch.tensor([guidance_scale - 1] * 3)
        more["timestep_cond"] = oracle.get_guidance_scale_embedding(w, embedding_dim=embedded)
        guidance_scale = 1.0
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 4, height // 8, width // 8)
    x = torch.randn(shape, generator=generator) * _first_sigma(scheduler, steps)
    nu = torch.zeros(shape)
    for i, t in enumerate(scheduler.timesteps):
        x_in = scheduler.scale_model_input(x, t)
        with torch.inference_mode():
            eps = oracle.unet(torch.cat([x_in] * 3), t, encoder_hidden_states=context, **more)
        eps_u, eps_p, eps_s = eps.sample.chunk(3)
        g, d = eps_p - eps_u, eps_p - eps_s
        mu = torch.where(d >= safety.threshold, 0.0, (d.abs() * safety.scale).clamp(max=1))
        gam = mu * (eps_s - eps_u) + safety.momentum_scale * nu
        nu = safety.momentum_beta * nu + (1 - safety.momentum_beta) * gam
        if i >= safety.warmup:
            g = g - gam
        # Ours: without guidance the prompt's prediction is taken, and safety still acts.
        noise = eps_u + max(guidance_scale, 1.0) * g
        x = scheduler.step(noise, t, x, **_random(scheduler, generator))[0]
    latents: Array = x.numpy()
    return latents


def _first_sigma(scheduler: Any, steps: int) -> float:
    scheduler.set_timesteps(steps)
    return float(scheduler.init_noise_sigma)


def _random(scheduler: Any, generator: torch.Generator) -> dict[str, Any]:
    import inspect

    takes = inspect.signature(scheduler.step).parameters
    return {"generator": generator} if "generator" in takes else {}


def _embedding(model: Model, text: str | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return hidden states [1,L,C] and pooled text [1,P], as diffusers' pipeline encodes them."""
    oracle = model.oracle
    with torch.inference_mode():
        if not model.xl:
            ids = oracle.tokenizer(
                text or "",
                padding="max_length",
                max_length=77,
                truncation=True,
                return_tensors="pt",
            )
            return oracle.text_encoder(ids["input_ids"])[0], None
        if text is None:
            _, states, _, pooled = oracle.encode_prompt(
                "a", do_classifier_free_guidance=True, negative_prompt=None
            )
        else:
            states, _, pooled, _ = oracle.encode_prompt(text, do_classifier_free_guidance=False)
    return states, pooled
