"""The embedding that every residual block of a UNet reads: time, guidance, pooled text, sizes.

Sines and cosines are always computed in FP32: near 1000 the steps of FP16 are 0.5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sld_edge.engines.errors import CheckpointError
from sld_edge.export.graphs.builder import GraphBuilder, Value
from sld_edge.export.graphs.layers import linear, silu
from sld_edge.export.graphs.unet_settings import pooled_width
from sld_edge.runtime.manifest import TIME_IDS

_LONGEST_WAVE = np.float32(np.log(10000))
_GUIDANCE_UNIT = 1000  # diffusers scales the guidance to the range of times
_F32 = np.dtype(np.float32)


def time_embedding(
    b: GraphBuilder,
    timestep: Value,
    settings: Mapping[str, Any],
    *,
    first: int,
    width: int,
    guidance: Value | None = None,
) -> Value:
    """Map timesteps f32 [B] to [B,width]: waves [B,first] and two linear layers.

    `guidance` f32 [B] is the guidance scale minus 1, for a UNet with `time_cond_proj_dim`; its
    waves are added to the time's. Raises CheckpointError for sizes that waves cannot have.
    Source: diffusers, models/embeddings.py, TimestepEmbedding, and the pipeline of Latent
    Consistency Models (arXiv 2310.04378).
    """
    if first % 2:
        key = f"{b.weights.name}: config key block_out_channels"
        raise CheckpointError(key, got=first, expected="an even number first")
    x = b.inner(_time_waves(b, timestep, settings, first, "time_proj"))
    if guidance is not None:
        x = _with_guidance(b, x, guidance, settings["time_cond_proj_dim"], first)
    return _two_layers(b, x, "time_embedding", first, width)


def text_and_size_embedding(
    b: GraphBuilder, pooled: Value, time_ids: Value, settings: Mapping[str, Any], *, width: int
) -> Value:
    """Map pooled text f32 [K*B,P] and time ids f32 [B,6] to [K*B,width].

    All branches of an image have the same time ids.
    Source: diffusers, UNet2DConditionModel.get_aug_embed, `text_time`.
    """
    dim = settings["addition_time_embed_dim"]
    text = pooled_width(settings, name=b.weights.name)
    x = _time_waves(b, time_ids, settings, dim, "add_time_proj")
    x = b.node("Reshape", x, b.ints(0, TIME_IDS * dim), name="add_time_proj/row", rank=2)
    x = b.node("Concat", b.inner(pooled), b.inner(x), name="add_embedding/joined", axis=-1)
    return _two_layers(b, x, "add_embedding", text + TIME_IDS * dim, width)


def _with_guidance(b: GraphBuilder, x: Value, guidance: Value, dim: int, first: int) -> Value:
    half = dim // 2
    if dim % 2 or half < 2:
        key = f"{b.weights.name}: config key time_cond_proj_dim"
        raise CheckpointError(key, got=dim, expected="an even number from 4")
    step = _LONGEST_WAVE / np.float32(half - 1)
    frequencies = np.exp(np.arange(half, dtype=np.float32) * -step)
    unit = b.scalar(_GUIDANCE_UNIT, _F32)
    scaled = b.node("Mul", guidance, unit, name="guidance_proj/scaled")
    waves = _waves(b, scaled, frequencies, "guidance_proj", cosine_first=False)
    key = "time_embedding.cond_proj"
    return b.node("Add", x, linear(b, b.inner(waves), key, dim, first, bias=False), name=key)


def _two_layers(b: GraphBuilder, x: Value, key: str, inputs: int, width: int) -> Value:
    x = linear(b, x, f"{key}.linear_1", inputs, width)
    x = silu(b, x, f"{key}.act")
    return linear(b, x, f"{key}.linear_2", width, width)


def _time_waves(
    b: GraphBuilder, numbers: Value, settings: Mapping[str, Any], dim: int, name: str
) -> Value:
    half, shift = dim // 2, settings["freq_shift"]
    if shift >= half:
        key = f"{b.weights.name}: config key freq_shift"
        raise CheckpointError(key, got=shift, expected=f"less than {half}")
    exponents = -_LONGEST_WAVE * np.arange(half, dtype=np.float32)
    exponents /= np.float32(half - shift)
    return _waves(b, numbers, np.exp(exponents), name, cosine_first=settings["flip_sin_to_cos"])


def _waves(
    b: GraphBuilder,
    numbers: Value,
    frequencies: NDArray[np.float32],
    name: str,
    *,
    cosine_first: bool,
) -> Value:
    """Return sines and cosines of each number at each frequency, on a new last axis."""
    table = b.constant(frequencies[None], f"{name}.frequencies")
    axis, rank = b.ints(numbers.rank), numbers.rank + 1
    column = b.node("Unsqueeze", numbers, axis, name=f"{name}/column", rank=rank)
    angles = b.node("Mul", column, table, name=f"{name}/angles")
    waves = [b.node(op, angles, name=f"{name}/{op.lower()}") for op in ("Sin", "Cos")]
    if cosine_first:
        waves.reverse()
    return b.node("Concat", *waves, name=name, axis=-1)
