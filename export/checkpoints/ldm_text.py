"""The text encoders of a file in the original layout: CLIP's names, or OpenCLIP's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from numpy.typing import NDArray

from sld_edge.engines.errors import CheckpointError
from sld_edge.export.checkpoints.checkpoint import Model
from sld_edge.export.checkpoints.ldm_keys import (
    HEAD_WIDTH,
    count_of,
    renamed,
    rows_of,
    size_of,
    under,
)
from sld_edge.export.checkpoints.weights import Entry, Weights

_OPENCLIP_UNUSED = ("logit_scale", "attn_mask")  # of training, and a constant
_OPENCLIP_PROJECTION = "text_projection"  # [C,P], in diffusers [P,C]
_PROJECTION = "text_projection.weight"
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


@dataclass(frozen=True, kw_only=True)
class _Transposed(Entry):
    """A matrix that the file holds transposed."""

    def read(self) -> NDArray[Any]:
        stored = Entry(file=self.file, offset=self.offset, dtype=self.dtype, shape=self.shape[::-1])
        return stored.read().T


def text_encoder_from_clip(entries: Mapping[str, Entry], prefix: str) -> Model:
    """Return the text encoder of SD 1.x or the first of SDXL: transformers' names under `prefix`.

    Some files lack `text_model.` in the names. Raises CheckpointError for missing tensors.
    """
    new = {
        f"text_model.{key.removeprefix('text_model.')}": entry
        for key, entry in under(entries, prefix).items()
    }
    return _text_model(new, name="text_encoder", activation="quick_gelu")


def text_encoder_from_openclip(
    entries: Mapping[str, Entry], prefix: str, *, name: str, pooled: bool
) -> Model:
    """Return the text encoder of SD 2.x, or where `pooled` the second of SDXL: OpenCLIP's names.

    SD 2.x uses neither the last block nor the projection, so they are left out; SDXL makes its
    pooled text with them. Raises CheckpointError for missing tensors and for fused tensors of odd
    shapes.
    """
    old = under(entries, prefix)
    blocks = count_of(old, r"transformer\.resblocks\.(\d+)\.")
    unused = [*_OPENCLIP_UNUSED]
    if not pooled:
        unused += [_OPENCLIP_PROJECTION, f"transformer.resblocks.{blocks - 1}."]
    new = {}
    for key, entry in old.items():
        if key.startswith(tuple(unused)):
            continue
        if key == _OPENCLIP_PROJECTION:
            new[_PROJECTION] = _transposed(entry, name)
            continue
        label = f"text_model.{renamed(key, _OPENCLIP_PARTS)}"
        stem, fused, kind = label.partition("in_proj_")  # in_proj_weight [3C,C], in_proj_bias [3C]
        if fused:
            for letter, third in zip("qkv", _thirds(entry, name), strict=True):
                new[f"{stem}{letter}_proj.{kind}"] = third
        else:
            new[label] = entry
    return _text_model(new, name=name, activation="gelu")


def _transposed(entry: Entry, name: str) -> Entry:
    if len(entry.shape) != 2:
        raise CheckpointError(f"{name}: the projection", got=list(entry.shape), expected="two axes")
    return _Transposed(
        file=entry.file, offset=entry.offset, dtype=entry.dtype, shape=entry.shape[::-1]
    )


def _thirds(entry: Entry, name: str) -> list[Entry]:
    """Split a tensor's rows into three entries of the same file."""
    if not entry.shape or entry.shape[0] % 3:
        raise CheckpointError(
            f"{name}: a fused projection", got=list(entry.shape), expected="rows of q, k and v"
        )
    rows = entry.shape[0] // 3
    part = replace(entry, shape=(rows, *entry.shape[1:]))
    return [replace(part, offset=part.offset + i * part.nbytes) for i in range(3)]


def _text_model(new: dict[str, Entry], *, name: str, activation: str) -> Model:
    tokens = "text_model.embeddings.token_embedding.weight"
    positions = "text_model.embeddings.position_embedding.weight"
    width, pooled = size_of(new, tokens, 1), _PROJECTION in new
    config = {
        "architectures": ["CLIPTextModelWithProjection" if pooled else "CLIPTextModel"],
        "vocab_size": rows_of(new, tokens),
        "hidden_size": width,
        "intermediate_size": rows_of(new, "text_model.encoder.layers.0.mlp.fc1.weight"),
        "num_hidden_layers": count_of(new, r"text_model\.encoder\.layers\.(\d+)\."),
        "num_attention_heads": width // HEAD_WIDTH,
        "max_position_embeddings": rows_of(new, positions),
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
        **({"projection_dim": rows_of(new, _PROJECTION)} if pooled else {}),
    }
    return Model(config=config, weights=Weights(new, name=name))
