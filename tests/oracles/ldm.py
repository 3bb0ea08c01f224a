"""A diffusers checkpoint in the original single-file layout, written the other way round.

Keys are rebuilt here from diffusers' names; that they are the original's is checked in the tests
with diffusers' own conversion of such files.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_OPENCLIP = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn": "attn",
    "fc1": "c_fc",
    "fc2": "c_proj",
}


def save_ldm_file(path: Path, models: dict[str, Any], *, openclip: bool) -> Path:
    """Save unet, vae, text_encoder and, for SDXL, text_encoder_2 in one file."""
    tensors = ldm_tensors(models, openclip=openclip)
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path)
    return path


def save_hollow(path: Path, tensors: Tensors) -> Path:
    """Save a file of the right size that holds no numbers: its names and shapes are tested."""
    header, end = {}, 0
    for key, tensor in tensors.items():
        begin, end = end, end + 4 * tensor.numel()
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    return path


def ldm_tensors(models: dict[str, Any], *, openclip: bool) -> Tensors:
    """All tensors of a file, with the buffers that published ones have."""
    text = models["text_encoder"].state_dict()
    if second := models.get("text_encoder_2"):
        encoders = {
            **clip(text, prefix="conditioner.embedders.0.transformer.text_model."),
            **open_clip(second.state_dict(), prefix="conditioner.embedders.1.model."),
        }
    else:
        encoders = open_clip_of_sd2(text) if openclip else clip(text)
    return {
        **{f"model.diffusion_model.{k}": t for k, t in ldm_unet(models["unet"]).items()},
        **{f"first_stage_model.{k}": t for k, t in ldm_vae(models["vae"]).items()},
        **encoders,
        "betas": torch.zeros(1000),
        "alphas_cumprod": torch.zeros(1000),
        "model_ema.decay": torch.zeros(()),
    }


def ldm_unet(unet: Any) -> Tensors:
    layers, levels = unet.config.layers_per_block, len(unet.config.block_out_channels)
    cross_up = ["Cross" in kind for kind in unet.config.up_block_types]
    tensors = {}
    for key, tensor in unet.state_dict().items():
        side, *rest = key.split(".")
        if side == "down_blocks":
            level, part, layer = int(rest[0]), rest[1], int(rest[2])
            first = 1 + level * (layers + 1)
            if part == "downsamplers":
                new = f"input_blocks.{first + layers}.0.op.{rest[-1]}"
            else:
                column = "0" if part == "resnets" else "1"
                new = f"input_blocks.{first + layer}.{column}.{_tail(part, rest[3:])}"
        elif side == "up_blocks":
            level, part, layer = int(rest[0]), rest[1], int(rest[2])
            first = level * (layers + 1)
            if part == "upsamplers":
                column = "2" if cross_up[level] else "1"
                new = f"output_blocks.{first + layers}.{column}.{'.'.join(rest[3:])}"
            else:
                column = "0" if part == "resnets" else "1"
                new = f"output_blocks.{first + layer}.{column}.{_tail(part, rest[3:])}"
        elif side == "mid_block":
            column = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}[".".join(rest[:2])]
            new = f"middle_block.{column}.{_tail(rest[0], rest[2:])}"
        else:
            stem, _, kind = key.rpartition(".")
            new = f"{_UNET_ENDS[stem]}.{kind}"
        tensors[new] = tensor
    assert len(tensors) == len(unet.state_dict())
    assert levels == len(cross_up)
    return tensors


def _tail(part: str, rest: list[str]) -> str:
    if part == "resnets":
        rest = [_RESNET[rest[0]], *rest[1:]]
    return ".".join(rest)


def ldm_vae(vae: Any) -> Tensors:
    levels = len(vae.config.block_out_channels)
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
    tensors = {}
    for key, tensor in vae.state_dict().items():
        if match := re.match(r"(\w+)\.mid_block\.attentions\.0\.(\w+)\.(?:0\.)?(\w+)", key):
            new = f"{match[1]}.mid.attn_1.{attention[match[2]]}.{match[3]}"
            if match[2] != "group_norm" and match[3] == "weight":
                tensor = tensor[:, :, None, None]
        elif match := re.match(r"(\w+)\.mid_block\.resnets\.(\d)\.(.*)", key):
            new = f"{match[1]}.mid.block_{int(match[2]) + 1}.{match[3]}"
        elif match := re.match(r"encoder\.down_blocks\.(\d)\.resnets\.(.*)", key):
            new = f"encoder.down.{match[1]}.block.{match[2]}"
        elif match := re.match(r"encoder\.down_blocks\.(\d)\.downsamplers\.0\.(.*)", key):
            new = f"encoder.down.{match[1]}.downsample.{match[2]}"
        elif match := re.match(r"decoder\.up_blocks\.(\d)\.resnets\.(.*)", key):
            new = f"decoder.up.{levels - 1 - int(match[1])}.block.{match[2]}"
        elif match := re.match(r"decoder\.up_blocks\.(\d)\.upsamplers\.0\.(.*)", key):
            new = f"decoder.up.{levels - 1 - int(match[1])}.upsample.{match[2]}"
        else:
            new = key.replace("conv_norm_out", "norm_out")
        tensors[new.replace("conv_shortcut", "nin_shortcut")] = tensor
    assert len(tensors) == len(vae.state_dict())
    return tensors


def clip(text: Tensors, prefix: str = "cond_stage_model.transformer.text_model.") -> Tensors:
    tensors = {prefix + key.removeprefix("text_model."): tensor for key, tensor in text.items()}
    return {**tensors, f"{prefix}embeddings.position_ids": torch.arange(77)[None]}


def open_clip(text: Tensors, prefix: str) -> Tensors:
    """OpenCLIP's names, fused projections, and its own projection the other way round."""
    names: dict[str, torch.Tensor] = {}
    fused: dict[str, Any] = {}
    for key, tensor in text.items():
        if key == "text_projection.weight":
            names[f"{prefix}text_projection"] = tensor.T
            continue
        new = key.removeprefix("text_model.")
        for theirs, original in _OPENCLIP.items():
            new = new.replace(theirs, original)
        if match := re.match(r"(.*\.attn)\.([qkv])_proj\.(weight|bias)", new):
            fused.setdefault(f"{match[1]}.in_proj_{match[3]}", {})[match[2]] = tensor
        else:
            names[prefix + new] = tensor
    for key, parts in fused.items():
        names[prefix + key] = torch.cat([parts[letter] for letter in "qkv"])
    return {**names, f"{prefix}logit_scale": torch.zeros(())}


def open_clip_of_sd2(text: Tensors) -> Tensors:
    """The same with a block and a projection more, which SD 2.x leaves out."""
    prefix = "cond_stage_model.model."
    names = open_clip(text, prefix)
    last = max(int(m[1]) for key in names if (m := re.search(r"resblocks\.(\d+)\.", key)))
    more = {
        key.replace(f"resblocks.{last}.", f"resblocks.{last + 1}."): torch.full_like(t, 9.0)
        for key, t in names.items()
        if f"resblocks.{last}." in key
    }
    width = text[next(key for key in text if key.endswith("token_embedding.weight"))].shape[1]
    return {**names, **more, f"{prefix}text_projection": torch.zeros(width, width)}
