"""A single `.safetensors` file in the original (latent-diffusion) layout: SD 1.x, 2.x and XL.

Its keys are mapped to diffusers' names, and the configs are inferred from the tensors' shapes.
Nothing is copied: q, k and v of a fused projection are three parts of one range of the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from sld_edge.engines.errors import CheckpointError
from sld_edge.export.checkpoints.checkpoint import Checkpoint, Model, tokenizer_json_for
from sld_edge.export.checkpoints.ldm_keys import HEAD_WIDTH, count_of, renamed, rows_of, under
from sld_edge.export.checkpoints.ldm_text import text_encoder_from_clip, text_encoder_from_openclip
from sld_edge.export.checkpoints.ldm_unet import UNET, unet_from_ldm
from sld_edge.export.checkpoints.tokenizer import OPENCLIP_PAD
from sld_edge.export.checkpoints.weights import Entry, Weights, entries_from_safetensors

Layout = Literal["sd1", "sd2", "sdxl"]

VAE = "first_stage_model."
CLIP, OPENCLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
SDXL_CLIP, SDXL_OPENCLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
_SDXL_REFINER = "conditioner.embedders.0.model."
_TEXT_ENCODERS: dict[Layout, tuple[str, ...]] = {
    "sd1": (CLIP,),
    "sd2": (OPENCLIP,),
    "sdxl": (SDXL_CLIP, SDXL_OPENCLIP),
}
_SCHEDULER = {  # training's noise schedule, the same for all (v1-inference.yaml, sd_xl_base.yaml)
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def checkpoint_from_ldm_file(
    file: Path, *, id: str, tokenizer: Path | None = None, prediction_type: str | None = None
) -> Checkpoint:
    """Open a single-file checkpoint.

    Args:
        file: `.safetensors`, whole: UNet, VAE and text encoders.
        id: the user's name for it.
        tokenizer: CLIP's tokenizer, which the file lacks; None: one beside the file.
        prediction_type: required for SD 2.x, whose file does not hold it; None: epsilon.

    Raises:
        CheckpointError: another layout or architecture, or a missing option that the file needs.
    """
    entries = entries_from_safetensors(file)
    layout = _layout(entries, file)
    if layout == "sd2" and prediction_type is None:
        raise CheckpointError(
            f"{file} is SD 2.x and does not hold the type of its UNet's prediction",
            do="give --prediction-type v_prediction (768 px models) or epsilon (base models)",
        )
    if tokenizer is None:
        tokenizer = _tokenizer_beside(file)
    models = _models(entries, layout, prediction_type)
    pads = {
        "text_encoder": OPENCLIP_PAD if layout == "sd2" else None,
        "text_encoder_2": OPENCLIP_PAD,
    }
    return Checkpoint(
        id=id,
        source="ldm-file",
        models=models,
        scheduler=_scheduler(prediction_type, layout),
        tokenizers={
            name: tokenizer_json_for(models[name], tokenizer, pad_token=pad)
            for name, pad in pads.items()
            if name in models
        },
    )


def models_from_ldm_file(file: Path, *, prediction_type: str | None = None) -> dict[str, Model]:
    """Open the models of a single-file checkpoint, by their folder's name in diffusers.

    Args:
        file: `.safetensors`, whole: UNet, VAE and text encoders, of SD 1.x, 2.x or XL.
        prediction_type: with "v_prediction" the default pictures of SD 1.x and 2.x have 768 pixels,
            else 512; SDXL's always have 1024.

    Raises:
        CheckpointError: another layout or architecture.
    """
    entries = entries_from_safetensors(file)
    return _models(entries, _layout(entries, file), prediction_type)


def _scheduler(prediction_type: str | None, layout: Layout) -> dict[str, Any]:
    """Return the scheduler_config.json of the layout's models; None: epsilon."""
    predicts = prediction_type if prediction_type is not None else "epsilon"
    if layout == "sdxl":
        return {"_class_name": "EulerDiscreteScheduler", **_SCHEDULER, "prediction_type": predicts}
    name = "DDIMScheduler" if predicts == "v_prediction" else "PNDMScheduler"
    return {"_class_name": name, **_SCHEDULER, "prediction_type": predicts}


def _layout(entries: Mapping[str, Entry], file: Path) -> Layout:
    def has(start: str) -> bool:
        return any(key.startswith(start) for key in entries)

    layout: Layout = "sd2" if has(OPENCLIP) else "sd1"
    if has("conditioner."):
        layout = "sdxl"
    elif has(f"{UNET}label_emb."):
        raise CheckpointError(f"{file} is not Stable Diffusion 1.x, 2.x or XL (unCLIP)")
    if has(_SDXL_REFINER):
        raise CheckpointError(f"{file} is SDXL's refiner", expected="the base model")
    encoders = _TEXT_ENCODERS[layout]
    missing = [
        *(part for part, start in (("UNet", UNET), ("VAE", VAE)) if not has(start)),
        *(
            f"text encoder{f' {i + 1}' if len(encoders) > 1 else ''}"
            for i, start in enumerate(encoders)
            if not has(start)
        ),
    ]
    if missing:
        expected = " or ".join(f"{'… and '.join(starts)}…" for starts in _TEXT_ENCODERS.values())
        raise CheckpointError(
            f"{file} is not a whole checkpoint in the original layout",
            got=f"no {', no '.join(missing)}",
            expected=f"tensors called {UNET}…, {VAE}… and {expected}",
            do="for a diffusers directory, give the directory",
        )
    return layout


def _models(
    entries: Mapping[str, Entry], layout: Layout, prediction_type: str | None
) -> dict[str, Model]:
    if layout == "sdxl":
        second = text_encoder_from_openclip(
            entries, SDXL_OPENCLIP, name="text_encoder_2", pooled=True
        )
        if "projection_dim" not in second.config:
            raise CheckpointError(f"the file lacks tensor {SDXL_OPENCLIP}text_projection")
        return {
            "unet": unet_from_ldm(
                entries,
                size=128,
                head_width=HEAD_WIDTH,
                pooled=second.config["projection_dim"],
            ),
            "text_encoder": text_encoder_from_clip(entries, SDXL_CLIP),
            "text_encoder_2": second,
            "vae": _vae(entries, scaling_factor=0.13025),
        }
    if layout == "sd2":
        text = text_encoder_from_openclip(entries, OPENCLIP, name="text_encoder", pooled=False)
    else:
        text = text_encoder_from_clip(entries, CLIP)
    return {
        "unet": unet_from_ldm(
            entries,
            size=96 if prediction_type == "v_prediction" else 64,
            head_width=HEAD_WIDTH if layout == "sd2" else None,
        ),
        "text_encoder": text,
        "vae": _vae(entries, scaling_factor=0.18215),
    }


def _tokenizer_beside(file: Path) -> Path:
    for place in (file.parent / "tokenizer.json", file.parent / "tokenizer"):
        if place.exists():
            return place
    raise CheckpointError(
        f"{file} holds no tokenizer",
        do="give CLIP's with --tokenizer DIR (vocab.json and merges.txt) or --tokenizer "
        "tokenizer.json, or put it beside the file",
    )


_VAE_PARTS = {
    "norm_out": "conv_norm_out",
    "nin_shortcut": "conv_shortcut",
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
}
_VAE_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}


def _vae(entries: Mapping[str, Entry], *, scaling_factor: float) -> Model:
    old = under(entries, VAE)
    levels = count_of(old, r"encoder\.down\.(\d+)\.")
    new = {}
    for key, entry in old.items():
        head, attention, tail = key.partition("mid.attn_1.")
        if attention:  # in the file 1x1 convolutions, in diffusers linear layers
            shape = entry.shape[:2] if math.prod(entry.shape[2:]) == 1 else entry.shape
            name = f"{head}mid_block.attentions.0.{renamed(tail, _VAE_ATTENTION)}"
            new[name] = replace(entry, shape=shape)
            continue
        name = re.sub(r"down\.(\d+)\.block\.", r"down_blocks.\1.resnets.", key)
        name = re.sub(r"down\.(\d+)\.downsample\.", r"down_blocks.\1.downsamplers.0.", name)
        if match := re.match(r"decoder\.up\.(\d+)\.(block|upsample)\.(.*)", name):
            level = levels - 1 - int(match[1])  # the original counts from the picture inwards
            part = "resnets" if match[2] == "block" else "upsamplers.0"
            name = f"decoder.up_blocks.{level}.{part}.{match[3]}"
        new[renamed(name, _VAE_PARTS)] = entry
    widths = [rows_of(old, f"encoder.down.{level}.block.0.conv1.weight") for level in range(levels)]
    config = {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": widths,
        "layers_per_block": count_of(old, r"encoder\.down\.0\.block\.(\d+)\."),
        "act_fn": "silu",
        "latent_channels": rows_of(old, "post_quant_conv.weight"),
        "norm_num_groups": 32,
        "scaling_factor": scaling_factor,
    }
    return Model(config=config, weights=Weights(new, name="vae"))
