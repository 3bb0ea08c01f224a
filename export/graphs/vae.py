"""Decoders of diffusers' AutoencoderKL and AutoencoderTiny.

AutoencoderTiny takes a tenth of the time, for previews and for models of few steps.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    optional_number,
    per_level,
)
from sld_edge.export.checkpoints.weights import Weights
from sld_edge.export.graphs.builder import GraphBuilder, GraphOptions, Value
from sld_edge.export.graphs.layers import (
    attention,
    conv,
    enlarged,
    group_norm,
    image_from_tokens,
    linear,
    resnet,
    silu,
    tokens_from_image,
    upsample,
)

_EPS = 1e-6  # hard-coded in diffusers' Encoder and Decoder
_LATENT_CHANNELS = 4
_F32 = np.dtype(np.float32)

VAE_KEYS = {
    "in_channels": one_of(3),
    "out_channels": one_of(3),
    "latent_channels": one_of(_LATENT_CHANNELS),
    "down_block_types": list_of(["DownEncoderBlock2D"], "DownEncoderBlock2D"),
    "up_block_types": list_of(["UpDecoderBlock2D"], "UpDecoderBlock2D"),
    "block_out_channels": counts([64]),
    "layers_per_block": count(1),
    "norm_num_groups": count(32),
    "act_fn": one_of("silu", "swish"),
    "scaling_factor": number(0.18215),
    "shift_factor": optional_number(),
    "use_quant_conv": flag(True),
    "use_post_quant_conv": flag(True),
    "mid_block_add_attention": flag(True),
    "latents_mean": one_of(None),
    "latents_std": one_of(None),
    # A size for tiling, and advice on precision; sld-edge lets the caller choose both.
    "sample_size": anything(32),
    "force_upcast": flag(True),
}

TINY_VAE_KEYS = {
    "in_channels": one_of(3),
    "out_channels": one_of(3),
    "latent_channels": one_of(_LATENT_CHANNELS),
    "decoder_block_out_channels": counts([64, 64, 64, 64]),
    "num_decoder_blocks": counts([3, 3, 3, 1]),
    "act_fn": one_of("relu"),
    "upsample_fn": one_of("nearest"),
    "upsampling_scaling_factor": one_of(2),
    "scaling_factor": number(1.0),
    "shift_factor": one_of(0.0, None),
    # Keys of the encoder and of latents stored as bytes, and advice on precision.
    "encoder_block_out_channels": anything(),
    "num_encoder_blocks": anything(),
    "latent_magnitude": anything(),
    "latent_shift": anything(),
    "force_upcast": flag(False),
    # A copy of decoder_block_out_channels, which diffusers adds for its pipelines.
    "block_out_channels": anything(),
    "sample_size": anything(),
}
_TINY_LIMIT = 3  # tanh limits latents to -3..3

# Names of the attention's layers before diffusers 0.17; SD 1.5's files still have them.
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def write_vae_decoder(
    config: Mapping[str, Any], weights: Weights, options: GraphOptions, path: Path
) -> None:
    """Write the decoder: latents f32 [B,4,h,w] -> images u8 [B,H,W,3], rounded half to even.

    A second output, finite f32 [B], is 1 where the decoder gave no NaN or infinity for the image,
    because bytes cannot show them. The latents are the sampler's: the graph divides by the scaling
    factor. Raises a CheckpointError that names a config key or tensor which is unknown, missing or
    bad.
    Source: diffusers, models/autoencoders/autoencoder_kl.py and image_processor.py.
    """
    settings = checked_config(config, VAE_KEYS, name=weights.name)
    with GraphBuilder(path, options, _with_new_names(weights)) as b:
        _ignore_half(b, "encoder.", "quant_conv.")
        x = b.input("latents", np.float32, ["B", _LATENT_CHANNELS, "h", "w"])
        x = b.node("Div", x, b.scalar(settings["scaling_factor"], _F32), name="latents/unscaled")
        if settings["shift_factor"] is not None:
            x = b.node("Add", x, b.scalar(settings["shift_factor"], _F32), name="latents/shifted")
        x = _decoder(b, b.inner(x), settings)
        x = b.outer(x)
        b.output(_pixels(b, x), "images", np.uint8, ["B", "H", "W", 3])
        b.output(_finite(b, x), "finite", np.float32, ["B"])


def write_tiny_decoder(
    config: Mapping[str, Any], weights: Weights, options: GraphOptions, path: Path
) -> None:
    """Write AutoencoderTiny's decoder: latents f32 [B,4,h,w] -> images u8 [B,H,W,3].

    The second output is finite f32 [B], as in `write_vae_decoder`; it is also 0 for latents that
    are not finite, because this model limits an infinite latent to 3. The latents are divided by
    this model's scaling factor, which is 1 in the published models. A picture is 2 ** (levels - 1)
    times as high and wide as the latents, where each of `num_decoder_blocks` is a level. Raises a
    CheckpointError that names a config key or tensor which is unknown, missing or bad.
    Source: diffusers, models/autoencoders/autoencoder_tiny.py and vae.py, DecoderTiny.
    """
    settings = checked_config(config, TINY_VAE_KEYS, name=weights.name)
    with GraphBuilder(path, options, weights) as b:
        _ignore_half(b, "encoder.")
        latents = b.input("latents", np.float32, ["B", _LATENT_CHANNELS, "h", "w"])
        scale = b.scalar(settings["scaling_factor"], _F32)
        x = b.node("Div", latents, scale, name="latents/unscaled")
        x = b.outer(_tiny_decoder(b, b.inner(x), settings))
        # This model gives numbers in 0..1; `_pixels` takes -1..1.
        x = b.node("Mul", x, b.scalar(2, _F32), name="images/of_2")
        x = b.node("Sub", x, b.scalar(1, _F32), name="images/of_1")
        b.output(_pixels(b, x), "images", np.uint8, ["B", "H", "W", 3])
        finite = b.node("Mul", _finite(b, latents), _finite(b, x), name="finite/both")
        b.output(finite, "finite", np.float32, ["B"])


def _decoder(b: GraphBuilder, x: Value, settings: dict[str, Any]) -> Value:
    groups, layers = settings["norm_num_groups"], settings["layers_per_block"]
    levels = _channels(b, settings, "up_block_types")[::-1]
    channels = levels[0]
    if settings["use_post_quant_conv"]:
        x = conv(b, x, "post_quant_conv", _LATENT_CHANNELS, _LATENT_CHANNELS, kernel=1)
    x = conv(b, x, "decoder.conv_in", _LATENT_CHANNELS, channels)
    x = _middle(b, x, "decoder.mid_block", channels, settings)
    for i, outputs in enumerate(levels):
        key = f"decoder.up_blocks.{i}"
        for j in range(layers + 1):
            x = resnet(b, x, f"{key}.resnets.{j}", channels, outputs, groups=groups, eps=_EPS)
            channels = outputs
        if i < len(levels) - 1:
            x = upsample(b, x, f"{key}.upsamplers.0", channels)
    return _end(b, x, "decoder", channels, 3, groups)


def _tiny_decoder(b: GraphBuilder, x: Value, settings: dict[str, Any]) -> Value:
    """DecoderTiny: a flat list of layers that also numbers activations and upsamplings."""
    widths, blocks = settings["decoder_block_out_channels"], settings["num_decoder_blocks"]
    levels = len(blocks) if isinstance(blocks, list) else 1
    blocks = per_level(blocks, levels, key="num_decoder_blocks", name=b.weights.name)
    widths = per_level(widths, levels, key="decoder_block_out_channels", name=b.weights.name)
    channels = widths[0]
    if set(widths) != {channels}:
        raise CheckpointError(
            f"{b.weights.name}: config key decoder_block_out_channels",
            got=widths,
            expected="the same number for all levels",
        )
    limit = b.scalar(_TINY_LIMIT)
    x = b.node("Div", x, limit, name="latents/of_limit")
    x = b.node("Mul", b.node("Tanh", x, name="latents/tanh"), limit, name="latents/bent")
    x = conv(b, x, "decoder.layers.0", _LATENT_CHANNELS, channels)
    x = b.node("Relu", x, name="decoder.layers.1")
    n = 2
    for i, blocks_of_level in enumerate(blocks):
        for _ in range(blocks_of_level):
            x = _tiny_block(b, x, f"decoder.layers.{n}", channels)
            n += 1
        if i < levels - 1:
            x = enlarged(b, x, f"decoder.layers.{n}")
            x = conv(b, x, f"decoder.layers.{n + 1}", channels, channels, bias=False)
            n += 2
    return conv(b, x, f"decoder.layers.{n}", channels, 3)


def _tiny_block(b: GraphBuilder, x: Value, key: str, channels: int) -> Value:
    y = x
    for j in (0, 2, 4):
        y = conv(b, y, f"{key}.conv.{j}", channels, channels)
        if j < 4:
            y = b.node("Relu", y, name=f"{key}.conv.{j + 1}")
    return b.node("Relu", b.node("Add", y, x, name=f"{key}/sum"), name=key)


def _middle(b: GraphBuilder, x: Value, key: str, channels: int, settings: dict[str, Any]) -> Value:
    groups = settings["norm_num_groups"]
    x = resnet(b, x, f"{key}.resnets.0", channels, channels, groups=groups, eps=_EPS)
    if settings["mid_block_add_attention"]:
        x = _attention(b, x, f"{key}.attentions.0", channels, groups)
    return resnet(b, x, f"{key}.resnets.1", channels, channels, groups=groups, eps=_EPS)


def _attention(b: GraphBuilder, image: Value, key: str, channels: int, groups: int) -> Value:
    """Self-attention of all pixels, one head."""
    x = group_norm(b, image, f"{key}.group_norm", channels, groups, _EPS)
    x = tokens_from_image(b, x, channels, key)
    q, k, v = (linear(b, x, f"{key}.to_{letter}", channels, channels) for letter in "qkv")
    x = attention(b, q, k, v, heads=1, channels=channels, name=key)
    x = linear(b, x, f"{key}.to_out.0", channels, channels)
    x = image_from_tokens(b, x, image, channels, key)
    return b.node("Add", image, x, name=key)


def _end(b: GraphBuilder, x: Value, key: str, channels: int, outputs: int, groups: int) -> Value:
    x = group_norm(b, x, f"{key}.conv_norm_out", channels, groups, _EPS)
    return conv(b, silu(b, x, f"{key}.conv_act"), f"{key}.conv_out", channels, outputs)


def _pixels(b: GraphBuilder, x: Value) -> Value:
    """Return FP32 [B,3,H,W] in -1..1 as bytes [B,H,W,3], as diffusers' image processor does."""
    x = b.node("Mul", x, b.scalar(0.5, _F32), name="images/half")
    x = b.node("Add", x, b.scalar(0.5, _F32), name="images/centred")
    x = b.node("Clip", x, b.scalar(0, _F32), b.scalar(1, _F32), name="images/clipped")
    x = b.node("Mul", x, b.scalar(255, _F32), name="images/scaled")
    x = b.node("Transpose", x, name="images/channels_last", perm=[0, 2, 3, 1])
    return b.cast(b.node("Round", x, name="images/rounded"), np.uint8, "images/bytes")


def _finite(b: GraphBuilder, x: Value) -> Value:
    """Reduce FP32 [B,C,H,W] to FP32 [B]: 1 where all is finite; NaN fails every comparison."""
    size = b.node("Abs", x, name="finite/size")
    limit = b.scalar(float(np.finfo(np.float32).max), _F32)
    each = b.cast(b.node("LessOrEqual", size, limit, name="finite/each"), np.float32, "finite/is")
    return b.node("ReduceMin", each, b.ints(1, 2, 3), name="finite/all", rank=1, keepdims=0)


def _channels(b: GraphBuilder, settings: dict[str, Any], blocks: str) -> list[int]:
    depth = len(settings[blocks])
    return per_level(
        settings["block_out_channels"], depth, key="block_out_channels", name=b.weights.name
    )


def _ignore_half(b: GraphBuilder, *prefixes: str) -> None:
    """Count the tensors of encoder or decoder as used, where this graph has only the other."""
    keys = b.weights.keys()
    b.weights.ignore(key for key in keys if key.startswith(prefixes))


def _with_new_names(weights: Weights) -> Weights:
    names, keys = {}, weights.keys()
    for key in keys:
        head, _, kind = key.rpartition(".")
        owner, _, layer = head.rpartition(".")
        if ".attentions." in key and layer in OLD_NAMES:
            names[key] = f"{owner}.{OLD_NAMES[layer]}.{kind}"
    return weights.renamed(names)
