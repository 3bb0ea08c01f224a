"""The UNet of Stable Diffusion 1.x, 2.x and XL, as diffusers' UNet2DConditionModel defines it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sld_edge.export.checkpoints.weights import Weights
from sld_edge.export.graphs.builder import GraphBuilder, GraphOptions, Value
from sld_edge.export.graphs.embedding import text_and_size_embedding, time_embedding
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
from sld_edge.export.graphs.unet_settings import (
    Level,
    levels_from_settings,
    middle_from_settings,
    pooled_width,
    unet_settings,
)
from sld_edge.runtime.manifest import TIME_IDS

_LAYER_NORM_EPS = 1e-5  # hard-coded in diffusers' BasicTransformerBlock
_TRANSFORMER_NORM_EPS = 1e-6  # hard-coded in Transformer2DModel
_SHALLOW_LAYERS = 1  # layers of the last up block that a shallow run computes again


def write_unet(
    config: Mapping[str, Any], weights: Weights, options: GraphOptions, path: Path
) -> None:
    """Write the UNet: latents f32 [B,4,h,w], timestep f32 [B], context f32 [K*B,L,C] (branch-major)
    -> noise_pred f32 [K*B,4,h,w], deep f32 [K*B,D,h,w]; B, K, L, h and w are run-time sizes.

    `deep` is the input of the last layer of the last up block from the layers below. DeepCache
    (arXiv 2312.00858) keeps it, and `write_shallow_unet` cuts the UNet there.

    Two kinds of UNet have more inputs. With `addition_embed_type` "text_time" (SDXL):
    pooled f32 [K*B,P] (branch-major), of the second text encoder, and time_ids f32 [B,6], an
    image's original height and width, the crop's top and left, target height and width, in pixels.
    With `time_cond_proj_dim` (Latent Consistency Models): guidance_embedded f32 [B], the guidance
    scale minus 1.

    Raises a CheckpointError that names a config key or tensor which is unknown, missing or bad.
    Source: diffusers, models/unets/unet_2d_condition.py.
    """  # noqa: D205 -- the interface is the summary
    settings = unet_settings(config, name=weights.name)
    with GraphBuilder(path, options, weights) as b:
        _Unet(b, settings).build()


class _Unet:
    """The settings that all blocks share, and the blocks."""

    def __init__(self, b: GraphBuilder, settings: dict[str, Any]) -> None:
        self.b = b
        self.settings = settings
        self.levels = levels_from_settings(settings, name=b.weights.name)
        self.middle = middle_from_settings(settings)
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
        self.embedding = self._embedding(timestep)

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

    def _embedding(self, timestep: Value) -> Value:
        """Time, guidance, pooled text and sizes, after the SiLU that every resnet applies."""
        b, settings, guidance = self.b, self.settings, None
        if settings["time_cond_proj_dim"] is not None:
            guidance = b.input("guidance_embedded", np.float32, ["B"])
        x = time_embedding(
            b,
            timestep,
            settings,
            first=self.levels[0].channels,
            width=self.embedding_width,
            guidance=guidance,
        )
        if settings["addition_embed_type"] == "text_time":
            text = pooled_width(settings, name=b.weights.name)
            pooled = b.input("pooled", np.float32, ["K*B", text], "wide")
            time_ids = b.input("time_ids", np.float32, ["B", TIME_IDS])
            more = text_and_size_embedding(
                b, pooled, time_ids, settings, width=self.embedding_width
            )
            x = b.node("Add", x, more, name="embedding")
        return silu(b, x, "time_embedding/activated")

    def _down(self, x: Value, i: int, channels: int, skips: list[tuple[Value, int]]) -> Value:
        level, key = self.levels[i], f"down_blocks.{i}"
        for j in range(level.layers):
            x = self._resnet(x, f"{key}.resnets.{j}", channels, level.channels)
            channels = level.channels
            x = self._transformer(x, f"{key}.attentions.{j}", level, level.down[j])
            skips.append((x, channels))
        if i < len(self.levels) - 1:
            x = conv(self.b, x, f"{key}.downsamplers.0.conv", channels, channels, stride=2)
            skips.append((x, channels))
        return x

    def _middle(self, x: Value) -> Value:
        level, middle = self.levels[-1], self.middle
        for j in range(middle.resnets):
            x = self._resnet(x, f"mid_block.resnets.{j}", level.channels, level.channels)
            if j == 0:
                x = self._transformer(x, "mid_block.attentions.0", level, middle.transformers)
        return x

    def _up(
        self, x: Value, i: int, channels: int, skips: list[tuple[Value, int]]
    ) -> tuple[Value, int]:
        level, key = self.levels[-1 - i], f"up_blocks.{i}"
        for j in range(level.layers + 1):
            if len(skips) == _SHALLOW_LAYERS:
                self.deep = self.b.widen(self.b.outer(x)), channels
                x = self.b.inner(self.deep[0])  # the layers after it read the kept output
            skip, skip_channels = skips.pop()
            resnet_key = f"{key}.resnets.{j}"
            x = self.b.node("Concat", x, skip, name=f"{resnet_key}/joined", axis=1)
            x = self._resnet(x, resnet_key, channels + skip_channels, level.channels)
            channels = level.channels
            x = self._transformer(x, f"{key}.attentions.{j}", level, level.up[j])
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

    def _transformer(self, image: Value, key: str, level: Level, blocks: int) -> Value:
        """Transformer2DModel; linear layers also stand for its 1x1 convolutions."""
        b, channels = self.b, level.channels
        if blocks == 0:
            return image
        x = group_norm(b, image, f"{key}.norm", channels, self.groups, _TRANSFORMER_NORM_EPS)
        x = tokens_from_image(b, x, channels, key)
        x = linear(b, x, f"{key}.proj_in", channels, channels)
        for n in range(blocks):
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

    def _attention(self, x: Value, source: Value, width: int, key: str, level: Level) -> Value:
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
