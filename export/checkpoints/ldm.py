"""A single `.safetensors` file in the original (latent-diffusion) layout: SD 1.x and 2.x.

Its keys are mapped to diffusers' names and the configs inferred from the tensors' shapes. Nothing
is copied: q, k and v of a fused projection are three views of one stretch of the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from sld_edge.engines.errors import CheckpointError
from sld_edge.export.checkpoints.checkpoint import (
    Checkpoint,
    Model,
    tokenizer_json_for,
)
from sld_edge.export.checkpoints.tokenizer import OPENCLIP_PAD
from sld_edge.export.checkpoints.weights import Entry, Weights, entries_from_safetensors

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPENCLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
_OPENCLIP_UNUSED_BLOCKS = 1  # SD 2.x conditions on the last but one block's output
_HEAD_WIDTH = 64  # both text encoders, and the UNet of 2.x; the UNet of 1.x has 8 heads throughout
_SCHEDULER = {  # training's noise schedule, the same for 1.x and 2.x (v1-inference.yaml)
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
        file: `.safetensors`, whole: UNet, VAE and text encoder.
        id: what the user named.
        tokenizer: CLIP's tokenizer, which the file does not hold; None looks beside the file.
        prediction_type: needed for SD 2.x, whose file does not tell; None is epsilon for 1.x.

    Raises:
        CheckpointError: another layout or architecture, or something that only an option can tell.
    """
    entries = entries_from_safetensors(file)
    if any(key.startswith(("conditioner.", UNET + "label_emb.")) for key in entries):
        raise CheckpointError(f"{file} is not Stable Diffusion 1.x or 2.x (SDXL or unCLIP)")
    openclip = any(key.startswith(OPENCLIP) for key in entries)
    prefixes = {"UNet": UNET, "VAE": VAE, "text encoder": OPENCLIP if openclip else CLIP}
    missing = [
        part for part, start in prefixes.items() if not any(k.startswith(start) for k in entries)
    ]
    if missing:
        raise CheckpointError(
            f"{file} is not a whole checkpoint in the original layout",
            got=f"no {', no '.join(missing)}",
            expected=f"tensors called {UNET}…, {VAE}… and {CLIP}… or {OPENCLIP}…",
            do="a diffusers directory is given as the directory",
        )
    if openclip and prediction_type is None:
        raise CheckpointError(
            f"{file} is SD 2.x and does not say what its UNet predicts",
            do="give --prediction-type v_prediction (the 768 px models) or epsilon (the base ones)",
        )
    if tokenizer is None:
        tokenizer = _tokenizer_beside(file)
    predicts = prediction_type if prediction_type is not None else "epsilon"
    text_encoder = _open_clip(entries) if openclip else _clip(entries)
    size = 96 if predicts == "v_prediction" else 64
    return Checkpoint(
        id=id,
        source="ldm-file",
        models={
            "unet": _unet(entries, openclip=openclip, size=size),
            "text_encoder": text_encoder,
            "vae": _vae(entries),
        },
        scheduler={
            "_class_name": "DDIMScheduler" if predicts == "v_prediction" else "PNDMScheduler",
            **_SCHEDULER,
            "prediction_type": predicts,
        },
        tokenizers={
            "text_encoder": tokenizer_json_for(
                text_encoder, tokenizer, pad_token=OPENCLIP_PAD if openclip else None
            )
        },
    )


def _tokenizer_beside(file: Path) -> Path:
    for place in (file.parent / "tokenizer.json", file.parent / "tokenizer"):
        if place.exists():
            return place
    raise CheckpointError(
        f"{file} holds no tokenizer",
        do="give CLIP's with --tokenizer DIR (vocab.json and merges.txt) or --tokenizer "
        "tokenizer.json, or put it beside the file",
    )


def _under(entries: Mapping[str, Entry], prefix: str) -> dict[str, Entry]:
    return {k.removeprefix(prefix): e for k, e in entries.items() if k.startswith(prefix)}


def _count(keys: Iterable[str], pattern: str) -> int:
    """How many different numbers stand in the pattern's group."""
    return len({m[1] for key in keys if (m := re.match(pattern, key))})


def _renamed(key: str, names: Mapping[str, str]) -> str:
    """Replace whole dotted parts of a key."""
    for old, new in names.items():
        key = re.sub(rf"(^|\.){re.escape(old)}(\.|$)", rf"\g<1>{new}\g<2>", key)
    return key


# --- UNet ---------------------------------------------------------------------------------------

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
}


def _unet(entries: Mapping[str, Entry], *, openclip: bool, size: int) -> Model:
    """UNet of the original layout: one flat list of blocks on each side, levels one after another.

    A level of the input side is its residual blocks, then a downsampling, but for the last; the
    output side has one residual block more a level, the last of which also holds the upsampling.
    """
    old = _under(entries, UNET)
    inputs, outputs = _count(old, r"input_blocks\.(\d+)\."), _count(old, r"output_blocks\.(\d+)\.")
    downs = [i for i in range(inputs) if f"input_blocks.{i}.0.op.weight" in old]
    levels = len(downs) + 1
    layers = (inputs - levels) // levels
    if inputs != levels * (layers + 1) or outputs != inputs or "input_blocks.0.0.weight" not in old:
        raise CheckpointError(
            "unet: the file's blocks are not those of Stable Diffusion",
            got=f"{inputs} input and {outputs} output blocks in {levels} levels",
        )
    names = dict(_UNET_ENDS)
    for i in range(1, inputs):
        level, layer = divmod(i - 1, layers + 1)
        down = f"down_blocks.{level}"
        names[f"input_blocks.{i}.0.op"] = f"{down}.downsamplers.0.conv"
        names[f"input_blocks.{i}.0"] = f"{down}.resnets.{layer}"
        names[f"input_blocks.{i}.1"] = f"{down}.attentions.{layer}"
    for i in range(outputs):
        level, layer = divmod(i, layers + 1)
        up = f"up_blocks.{level}"
        for part in (1, 2):  # the upsampling stands second where the level has no attention
            names[f"output_blocks.{i}.{part}.conv"] = f"{up}.upsamplers.0.conv"
        names[f"output_blocks.{i}.0"] = f"{up}.resnets.{layer}"
        names[f"output_blocks.{i}.1"] = f"{up}.attentions.{layer}"
    new = {_renamed(_start_renamed(key, names), _RESNET): entry for key, entry in old.items()}
    widths = [
        _rows(old, f"input_blocks.{1 + level * (layers + 1)}.0.out_layers.3.weight")
        for level in range(levels)
    ]
    attends = [
        f"input_blocks.{1 + level * (layers + 1)}.1.norm.weight" in old for level in range(levels)
    ]
    kv = next((key for key in old if key.endswith("attn2.to_k.weight")), None)
    projection = next((e for k, e in old.items() if k.endswith("1.proj_in.weight")), None)
    if kv is None or projection is None:
        raise CheckpointError("unet: the file has no cross-attention")
    config = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": size,
        "in_channels": _size(old, "input_blocks.0.0.weight", 1),
        "out_channels": _rows(old, "out.2.weight"),
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "down_block_types": ["CrossAttnDownBlock2D" if on else "DownBlock2D" for on in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if on else "UpBlock2D" for on in attends[::-1]],
        "block_out_channels": widths,
        "layers_per_block": layers,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "act_fn": "silu",
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "cross_attention_dim": _size(old, kv, 1),
        # diffusers' misnomer: this is the number of heads.
        "attention_head_dim": [width // _HEAD_WIDTH for width in widths] if openclip else 8,
        "use_linear_projection": len(projection.shape) == 2,
    }
    return Model(config=config, weights=Weights(new, name="unet"))


def _start_renamed(key: str, names: Mapping[str, str]) -> str:
    """Replace the longest listed start of a key."""
    parts = key.split(".")
    for n in range(len(parts) - 1, 0, -1):
        start = ".".join(parts[:n])
        if start in names:
            return ".".join([names[start], *parts[n:]])
    return key


def _rows(entries: Mapping[str, Entry], key: str) -> int:
    return _size(entries, key, 0)


def _size(entries: Mapping[str, Entry], key: str, axis: int) -> int:
    """Return one side of a tensor's shape."""
    if key not in entries:
        raise CheckpointError(f"the file lacks tensor {key}")
    shape = entries[key].shape
    if axis >= len(shape) or not shape[axis]:
        raise CheckpointError(f"the file's tensor {key} has shape", got=list(shape))
    return shape[axis]


# --- VAE ----------------------------------------------------------------------------------------

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


def _vae(entries: Mapping[str, Entry]) -> Model:
    old = _under(entries, VAE)
    levels = _count(old, r"encoder\.down\.(\d+)\.")
    new = {}
    for key, entry in old.items():
        head, attention, tail = key.partition("mid.attn_1.")
        if attention:  # 1x1 convolutions there, linear layers here
            shape = entry.shape[:2] if math.prod(entry.shape[2:]) == 1 else entry.shape
            name = f"{head}mid_block.attentions.0.{_renamed(tail, _VAE_ATTENTION)}"
            new[name] = replace(entry, shape=shape)
            continue
        name = re.sub(r"down\.(\d+)\.block\.", r"down_blocks.\1.resnets.", key)
        name = re.sub(r"down\.(\d+)\.downsample\.", r"down_blocks.\1.downsamplers.0.", name)
        if match := re.match(r"decoder\.up\.(\d+)\.(block|upsample)\.(.*)", name):
            level = levels - 1 - int(match[1])  # the original counts from the picture inwards
            part = "resnets" if match[2] == "block" else "upsamplers.0"
            name = f"decoder.up_blocks.{level}.{part}.{match[3]}"
        new[_renamed(name, _VAE_PARTS)] = entry
    widths = [_rows(old, f"encoder.down.{level}.block.0.conv1.weight") for level in range(levels)]
    config = {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": widths,
        "layers_per_block": _count(old, r"encoder\.down\.0\.block\.(\d+)\."),
        "act_fn": "silu",
        "latent_channels": _rows(old, "post_quant_conv.weight"),
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
    }
    return Model(config=config, weights=Weights(new, name="vae"))


# --- text encoders ------------------------------------------------------------------------------

_OPENCLIP_PARTS = {
    "transformer.resblocks": "encoder.layers",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn": "self_attn",
    "c_fc": "fc1",
    "c_proj": "fc2",
    "ln_final": "final_layer_norm",
    "token_embedding": "embeddings.token_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
}


def _clip(entries: Mapping[str, Entry]) -> Model:
    """SD 1.x: transformers' own names under a prefix, in some files without `text_model.`."""
    new = {
        f"text_model.{key.removeprefix('text_model.')}": entry
        for key, entry in _under(entries, CLIP).items()
    }
    return _text_model(new, activation="quick_gelu")


def _open_clip(entries: Mapping[str, Entry]) -> Model:
    """SD 2.x: OpenCLIP's names; without its last block, its projection and its temperature."""
    old = _under(entries, OPENCLIP)
    blocks = _count(old, r"transformer\.resblocks\.(\d+)\.")
    unused = tuple(
        f"transformer.resblocks.{i}." for i in range(blocks - _OPENCLIP_UNUSED_BLOCKS, blocks)
    )
    new = {}
    for key, entry in old.items():
        if key.startswith(unused) or key in ("text_projection", "logit_scale", "attn_mask"):
            continue
        name = f"text_model.{_renamed(key, _OPENCLIP_PARTS)}"
        stem, fused, kind = name.partition("in_proj_")  # in_proj_weight [3C,C], in_proj_bias [3C]
        if fused:
            for letter, third in zip("qkv", _thirds(entry), strict=True):
                new[f"{stem}{letter}_proj.{kind}"] = third
        else:
            new[name] = entry
    return _text_model(new, activation="gelu")


def _thirds(entry: Entry) -> list[Entry]:
    """Split a tensor's rows into three views of the file."""
    if not entry.shape or entry.shape[0] % 3:
        raise CheckpointError(
            "text_encoder: a fused projection", got=list(entry.shape), expected="rows of q, k and v"
        )
    rows = entry.shape[0] // 3
    part = replace(entry, shape=(rows, *entry.shape[1:]))
    return [replace(part, offset=part.offset + i * part.nbytes) for i in range(3)]


def _text_model(new: dict[str, Entry], *, activation: str) -> Model:
    tokens = "text_model.embeddings.token_embedding.weight"
    positions = "text_model.embeddings.position_embedding.weight"
    width = _size(new, tokens, 1)
    config = {
        "architectures": ["CLIPTextModel"],
        "vocab_size": _rows(new, tokens),
        "hidden_size": width,
        "intermediate_size": _rows(new, "text_model.encoder.layers.0.mlp.fc1.weight"),
        "num_hidden_layers": _count(new, r"text_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": width // _HEAD_WIDTH,
        "max_position_embeddings": _rows(new, positions),
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
    }
    return Model(config=config, weights=Weights(new, name="text_encoder"))
