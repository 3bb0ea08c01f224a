"""The UNet of Stable Diffusion 1.x and 2.x, as diffusers' UNet2DConditionModel defines it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sld_edge.engines.errors import CheckpointError
from sld_edge.export.checkpoints.config import (
    anything,
    checked_config,
    count,
    counts,
    flag,
    list_of,
    number,
    one_of,
    per_level,
)
from sld_edge.export.checkpoints.weights import Weights
from sld_edge.export.graphs.builder import GraphBuilder, GraphOptions, Value
from sld_edge.export.graphs.layers import (
    attention,
    conv,
    gelu,
    group_norm,
    image_from_tokens,
    layer_norm,
    linear,
    resnet,
    silu,
    tokens_from_image,
    upsample,
)

_LAYER_NORM_EPS = 1e-5  # hard-coded in diffusers' BasicTransformerBlock
_TRANSFORMER_NORM_EPS = 1e-6  # and in Transformer2DModel
_SHALLOW_LAYERS = 1  # layers of the last up block that a shallow run does again

UNET_KEYS = {
    "in_channels": one_of(4),
    "out_channels": one_of(4),
    "down_block_types": list_of(
        ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "CrossAttnDownBlock2D", "DownBlock2D"
    ),
    "up_block_types": list_of(
        ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, "CrossAttnUpBlock2D", "UpBlock2D"
    ),
    "mid_block_type": one_of("UNetMidBlock2DCrossAttn"),
    "block_out_channels": counts([320, 640, 1280, 1280]),
    "layers_per_block": counts(2),
    "transformer_layers_per_block": counts(1),
    "attention_head_dim": counts(8),
    "cross_attention_dim": count(1280),
    "norm_num_groups": count(32),
    "norm_eps": number(1e-5),
    "flip_sin_to_cos": flag(True),
    "freq_shift": number(0, positive=False),
    "use_linear_projection": flag(False),
    "act_fn": one_of("silu", "swish"),
    # What the builder does not know: only the value that switches it off.
    "center_input_sample": one_of(False),
    "only_cross_attention": one_of(False),
    "downsample_padding": one_of(1),
    "mid_block_scale_factor": one_of(1),
    "reverse_transformer_layers_per_block": one_of(None),
    "encoder_hid_dim": one_of(None),
    "encoder_hid_dim_type": one_of(None),
    "num_attention_heads": one_of(None),
    "dual_cross_attention": one_of(False),
    "class_embed_type": one_of(None),
    "addition_embed_type": one_of(None),
    "addition_time_embed_dim": one_of(None),
    "num_class_embeds": one_of(None),
    "resnet_time_scale_shift": one_of("default"),
    "resnet_skip_time_act": one_of(False),
    "resnet_out_scale_factor": one_of(1.0),
    "time_embedding_type": one_of("positional"),
    "time_embedding_dim": one_of(None),
    "time_embedding_act_fn": one_of(None),
    "timestep_post_act": one_of(None),
    "time_cond_proj_dim": one_of(None),
    "conv_in_kernel": one_of(3),
    "conv_out_kernel": one_of(3),
    "projection_class_embeddings_input_dim": one_of(None),
    "attention_type": one_of("default"),
    "class_embeddings_concat": one_of(False),
    "mid_block_only_cross_attention": one_of(None, False),
    "cross_attention_norm": one_of(None),
    # What makes no difference: sizes are free, dropout trains, SDPA ignores the upcast, the rest
    # is left over from training with an average of the weights.
    "sample_size": anything(),
    "dropout": anything(0.0),
    "upcast_attention": flag(False),
    "addition_embed_type_num_heads": anything(64),
    **dict.fromkeys(
        (
            "decay",
            "inv_gamma",
            "min_decay",
            "optimization_step",
            "power",
            "update_after_step",
            "use_ema_warmup",
        ),
        anything(),
    ),
}


@dataclass(frozen=True, kw_only=True)
class _Level:
    channels: int
    layers: int
    heads: int
    transformers: int
    down_attends: bool
    up_attends: bool


def write_unet(
    config: Mapping[str, Any], weights: Weights, options: GraphOptions, path: Path
) -> None:
    """Write the UNet: latents f32 [B,4,h,w], timestep f32 [B], context f32 [K*B,L,C] (branch-major)
    -> noise_pred f32 [K*B,4,h,w], deep f32 [K*B,D,h,w]; B, K, L, h and w are run-time sizes.

    `deep` is what the last layer of the last up block takes from the layers below: what DeepCache
    (arXiv 2312.00858) keeps, and where `shallow_unet` cuts.

    Raises CheckpointError, naming it, for a config key or tensor that is unknown, missing or bad.
    Source: diffusers, models/unets/unet_2d_condition.py.
    """  # noqa: D205 -- the interface is the summary
    settings = checked_config(config, UNET_KEYS, name=weights.name)
    with GraphBuilder(path, options, weights) as b:
        _Unet(b, settings).build()


class _Unet:
    """The settings that all blocks share, and the blocks."""

    def __init__(self, b: GraphBuilder, settings: dict[str, Any]) -> None:
        self.b = b
        self.settings = settings
        self.levels = _levels(settings, b.weights.name)
        self.width = settings["cross_attention_dim"]
        self.groups = settings["norm_num_groups"]
        self.embedding_width = 4 * self.levels[0].channels
        self.context: Value
        self.embedding: Value
        self.deep: tuple[Value, int]

    def build(self) -> None:
        b, first = self.b, self.levels[0].channels
        latents = b.input("latents", np.float32, ["B", 4, "h", "w"])
        timestep = b.input("timestep", np.float32, ["B"])
        context = b.input("context", np.float32, ["K*B", "L", self.width], "wide")
        b.set_branches(context, latents)
        if not b.options.shared_prefix:
            latents, timestep = b.widen(latents), b.widen(timestep)
        self.context = b.inner(context)
        self.embedding = self._time_embedding(timestep)

        x = conv(b, b.inner(latents), "conv_in", 4, first)
        skips, channels = [(x, first)], first
        for i in range(len(self.levels)):
            x = self._down(x, i, channels, skips)
            channels = self.levels[i].channels
        x = self._middle(x)
        for i in range(len(self.levels)):
            x, channels = self._up(x, i, channels, skips)
        x = group_norm(b, x, "conv_norm_out", first, self.groups, self.settings["norm_eps"])
        x = conv(b, silu(b, x, "conv_act"), "conv_out", first, 4)
        x = b.widen(b.outer(x))
        b.output(x, "noise_pred", np.float32, ["K*B", 4, "h", "w"])
        deep, channels = self.deep
        b.output(deep, "deep", np.float32, ["K*B", channels, "h", "w"])

    def _time_embedding(self, timestep: Value) -> Value:
        """Sines and cosines in FP32, two linear layers, and the SiLU that every resnet applies."""
        b, first, width = self.b, self.levels[0].channels, self.embedding_width
        if first % 2:
            what = f"{b.weights.name}: config key block_out_channels"
            raise CheckpointError(what, got=first, expected="an even number first")
        half = first // 2
        exponents = np.float32(-np.log(10000)) * np.arange(half, dtype=np.float32)
        shift = self.settings["freq_shift"]
        if shift >= half:
            what = f"{b.weights.name}: config key freq_shift"
            raise CheckpointError(what, got=shift, expected=f"less than {half}")
        exponents /= np.float32(half - shift)
        frequencies = b.constant(np.exp(exponents)[None], "time_proj.frequencies")
        column = b.node("Unsqueeze", timestep, b.ints(1), name="time_proj/column", rank=2)
        angles = b.node("Mul", column, frequencies, name="time_proj/angles")
        waves = [b.node(op, angles, name=f"time_proj/{op.lower()}") for op in ("Sin", "Cos")]
        if self.settings["flip_sin_to_cos"]:
            waves.reverse()
        x = b.node("Concat", *waves, name="time_proj", axis=-1)
        x = linear(b, b.inner(x), "time_embedding.linear_1", first, width)
        x = silu(b, x, "time_embedding.act")
        x = linear(b, x, "time_embedding.linear_2", width, width)
        return silu(b, x, "time_embedding/activated")

    def _down(self, x: Value, i: int, channels: int, skips: list[tuple[Value, int]]) -> Value:
        level, key = self.levels[i], f"down_blocks.{i}"
        for j in range(level.layers):
            x = self._resnet(x, f"{key}.resnets.{j}", channels, level.channels)
            channels = level.channels
            if level.down_attends:
                x = self._transformer(x, f"{key}.attentions.{j}", level)
            skips.append((x, channels))
        if i < len(self.levels) - 1:
            x = conv(self.b, x, f"{key}.downsamplers.0.conv", channels, channels, stride=2)
            skips.append((x, channels))
        return x

    def _middle(self, x: Value) -> Value:
        level = self.levels[-1]
        x = self._resnet(x, "mid_block.resnets.0", level.channels, level.channels)
        x = self._transformer(x, "mid_block.attentions.0", level)
        return self._resnet(x, "mid_block.resnets.1", level.channels, level.channels)

    def _up(
        self, x: Value, i: int, channels: int, skips: list[tuple[Value, int]]
    ) -> tuple[Value, int]:
        level, key = self.levels[-1 - i], f"up_blocks.{i}"
        for j in range(level.layers + 1):
            if len(skips) == _SHALLOW_LAYERS:
                self.deep = self.b.outer(x), channels
                x = self.b.inner(self.deep[0])  # all that follows reads what is kept
            skip, skip_channels = skips.pop()
            resnet_key = f"{key}.resnets.{j}"
            x = self.b.node("Concat", x, skip, name=f"{resnet_key}/joined", axis=1)
            x = self._resnet(x, resnet_key, channels + skip_channels, level.channels)
            channels = level.channels
            if level.up_attends:
                x = self._transformer(x, f"{key}.attentions.{j}", level)
        if i < len(self.levels) - 1:
            x = upsample(self.b, x, f"{key}.upsamplers.0", channels, like=skips[-1][0])
        return x, channels

    def _resnet(self, x: Value, key: str, inputs: int, outputs: int) -> Value:
        return resnet(
            self.b,
            x,
            key,
            inputs,
            outputs,
            groups=self.groups,
            eps=self.settings["norm_eps"],
            embedding=(self.embedding, self.embedding_width),
        )

    def _transformer(self, image: Value, key: str, level: _Level) -> Value:
        """Transformer2DModel; its 1x1 convolutions are the linear layers of the other form."""
        b, channels = self.b, level.channels
        x = group_norm(b, image, f"{key}.norm", channels, self.groups, _TRANSFORMER_NORM_EPS)
        x = tokens_from_image(b, x, channels, key)
        x = linear(b, x, f"{key}.proj_in", channels, channels)
        for n in range(level.transformers):
            block = f"{key}.transformer_blocks.{n}"
            y = layer_norm(b, x, f"{block}.norm1", channels, _LAYER_NORM_EPS)
            y = self._attention(y, y, channels, f"{block}.attn1", level)
            x = b.node("Add", x, y, name=f"{block}/after_attn1")
            y = layer_norm(b, x, f"{block}.norm2", channels, _LAYER_NORM_EPS)
            y = self._attention(y, self.context, self.width, f"{block}.attn2", level)
            x = b.node("Add", x, y, name=f"{block}/after_attn2")
            y = layer_norm(b, x, f"{block}.norm3", channels, _LAYER_NORM_EPS)
            y = self._feed_forward(y, f"{block}.ff", channels)
            x = b.node("Add", x, y, name=f"{block}/after_ff")
        x = linear(b, x, f"{key}.proj_out", channels, channels)
        x = image_from_tokens(b, x, image, channels, key)
        return b.node("Add", image, x, name=key)

    def _attention(self, x: Value, source: Value, width: int, key: str, level: _Level) -> Value:
        b, channels = self.b, level.channels
        q = linear(b, x, f"{key}.to_q", channels, channels, bias=False)
        k = linear(b, source, f"{key}.to_k", width, channels, bias=False)
        v = linear(b, source, f"{key}.to_v", width, channels, bias=False)
        y = attention(b, q, k, v, heads=level.heads, channels=channels, name=key)
        return linear(b, y, f"{key}.to_out.0", channels, channels)

    def _feed_forward(self, x: Value, key: str, channels: int) -> Value:
        """GEGLU: the first half is the value, the second its gate."""
        b, inner = self.b, 4 * channels
        both = linear(b, x, f"{key}.net.0.proj", channels, 2 * inner)
        value, gate = b.split(both, (inner, inner), -1, f"{key}.net.0/halves")
        gate = gelu(b, gate, f"{key}.net.0/gate")
        x = b.node("Mul", value, gate, name=f"{key}.net.0")
        return linear(b, x, f"{key}.net.2", inner, channels)


def _levels(settings: dict[str, Any], name: str) -> list[_Level]:
    down = settings["down_block_types"]
    depth = len(down)

    def each(key: str) -> list[Any]:
        return per_level(settings[key], depth, key=key, name=name)

    channels, up = each("block_out_channels"), each("up_block_types")
    # diffusers' attention_head_dim IS the number of heads (its issue 2011).
    heads, layers = each("attention_head_dim"), each("layers_per_block")
    transformers = each("transformer_layers_per_block")
    return [
        _Level(
            channels=channels[i],
            layers=layers[i],
            heads=heads[i],
            transformers=transformers[i],
            down_attends=down[i].startswith("CrossAttn"),
            up_attends=up[depth - 1 - i].startswith("CrossAttn"),
        )
        for i in range(depth)
    ]
