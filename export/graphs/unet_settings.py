"""The keys of a UNet's config.json that the builder knows, and the levels that it describes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sld_edge.engines.errors import CheckpointError
from sld_edge.export.checkpoints.config import (
    Key,
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
from sld_edge.runtime.manifest import TIME_IDS


def _or_null(rule: Key) -> Key:
    return Key(
        None, lambda value: value is None or rule.accepts(value), f"{rule.expected}, or null"
    )


def _counts_per_layer() -> Key:
    """Accept a number of transformer blocks for all levels, for each level, or for each layer."""
    rule = counts(1)
    return Key(
        1,
        lambda value: (
            rule.accepts(value)
            or (isinstance(value, list) and bool(value) and all(map(rule.accepts, value)))
        ),
        "a positive integer, or a list of them (or of lists of them) with an entry for each level",
    )


UNET_KEYS = {
    "in_channels": one_of(4),
    "out_channels": one_of(4),
    "down_block_types": list_of(
        ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], "CrossAttnDownBlock2D", "DownBlock2D"
    ),
    "up_block_types": list_of(
        ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3, "CrossAttnUpBlock2D", "UpBlock2D"
    ),
    "mid_block_type": one_of("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    "block_out_channels": counts([320, 640, 1280, 1280]),
    "layers_per_block": counts(2),
    "transformer_layers_per_block": _counts_per_layer(),
    "reverse_transformer_layers_per_block": _or_null(_counts_per_layer()),
    "attention_head_dim": counts(8),
    "cross_attention_dim": count(1280),
    "norm_num_groups": count(32),
    "norm_eps": number(1e-5),
    "flip_sin_to_cos": flag(True),
    "freq_shift": number(0, positive=False),
    "use_linear_projection": flag(False),
    "addition_embed_type": one_of(None, "text_time"),
    "addition_time_embed_dim": _or_null(count(None)),
    "projection_class_embeddings_input_dim": _or_null(count(None)),
    "time_cond_proj_dim": _or_null(count(None)),
    "act_fn": one_of("silu", "swish"),
    # Features that the builder does not know, with the values that switch them off.
    "center_input_sample": one_of(False),
    "only_cross_attention": one_of(False),
    "downsample_padding": one_of(1),
    "mid_block_scale_factor": one_of(1),
    "encoder_hid_dim": one_of(None),
    "encoder_hid_dim_type": one_of(None),
    "num_attention_heads": one_of(None),
    "dual_cross_attention": one_of(False),
    "class_embed_type": one_of(None),
    "num_class_embeds": one_of(None),
    "resnet_time_scale_shift": one_of("default"),
    "resnet_skip_time_act": one_of(False),
    "resnet_out_scale_factor": one_of(1.0),
    "time_embedding_type": one_of("positional"),
    "time_embedding_dim": one_of(None),
    "time_embedding_act_fn": one_of(None),
    "timestep_post_act": one_of(None),
    "conv_in_kernel": one_of(3),
    "conv_out_kernel": one_of(3),
    "attention_type": one_of("default"),
    "class_embeddings_concat": one_of(False),
    "mid_block_only_cross_attention": one_of(None, False),
    "cross_attention_norm": one_of(None),
    # Keys that do not change the graph: sizes are free, dropout is for training, SDPA ignores the
    # upcast, and the keys of an average of the weights are for training.
    "sample_size": anything(),
    "dropout": anything(0.0),
    "upcast_attention": one_of(False, True, None),
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
class Level:
    """A resolution of the UNet.

    Attributes:
        channels: of every layer.
        layers: of the down block; the up block has one layer more.
        heads: of every attention.
        down: number of transformer blocks after each layer of the down block, 0 for none.
        up: the same for the up block.
    """

    channels: int
    layers: int
    heads: int
    down: tuple[int, ...]
    up: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Middle:
    """The block between down and up: its residual layers, and transformer blocks after the first.

    Attributes:
        resnets: 0 where the UNet has no middle block.
        transformers: 0 for none.
    """

    resnets: int
    transformers: int


def unet_settings(config: Mapping[str, Any], *, name: str) -> dict[str, Any]:
    """Return a UNet's config with defaults filled in.

    Raises:
        CheckpointError: an unknown key, or a value that the builder does not support.
    """
    settings = checked_config(config, UNET_KEYS, name=name)
    if settings["addition_embed_type"] is None:
        for key in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
            if settings[key] is not None:
                raise CheckpointError(
                    f"{name}: config key {key}",
                    got=settings[key],
                    expected="null where addition_embed_type is null",
                )
    else:
        pooled_width(settings, name=name)
    return settings


def pooled_width(settings: Mapping[str, Any], *, name: str) -> int:
    """Return P, the width of the pooled text that `text_time` adds to the time embedding.

    Raises:
        CheckpointError: sizes that leave no room for pooled text beside the time ids.
    """
    dim = settings["addition_time_embed_dim"]
    total = settings["projection_class_embeddings_input_dim"]
    if dim is None or dim % 2:
        raise CheckpointError(
            f"{name}: config key addition_time_embed_dim", got=dim, expected="an even number"
        )
    if total is None or total <= TIME_IDS * dim:
        raise CheckpointError(
            f"{name}: config key projection_class_embeddings_input_dim",
            got=total,
            expected=f"more than {TIME_IDS} times addition_time_embed_dim {dim}: the rest is the "
            "width of the pooled text",
        )
    return int(total) - TIME_IDS * int(dim)


def levels_from_settings(settings: Mapping[str, Any], *, name: str) -> list[Level]:
    """Return the levels of a UNet, the finest first.

    Raises:
        CheckpointError: the length of a list is not the number of levels or layers.
    """
    down = settings["down_block_types"]
    depth = len(down)

    def each(key: str) -> list[Any]:
        return per_level(settings[key], depth, key=key, name=name)

    channels, up = each("block_out_channels"), each("up_block_types")
    # diffusers' attention_head_dim IS the number of heads (its issue 2011).
    heads, layers = each("attention_head_dim"), each("layers_per_block")
    key, reverse_key = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
    transformers = each(key)
    if settings[reverse_key] is None:
        reverse_key, up_transformers = key, transformers
    else:
        up_transformers = each(reverse_key)[::-1]

    def blocks(kind: str, value: Any, layers: int, key: str) -> tuple[int, ...]:
        if not kind.startswith("CrossAttn"):
            return (0,) * layers
        values = value if isinstance(value, list) else [value] * layers
        if len(values) != layers:
            raise CheckpointError(
                f"{name}: config key {key}",
                got=f"{len(values)} values",
                expected=f"{layers} layers",
            )
        return tuple(values)

    return [
        Level(
            channels=channels[i],
            layers=layers[i],
            heads=heads[i],
            down=blocks(down[i], transformers[i], layers[i], key),
            up=blocks(up[depth - 1 - i], up_transformers[i], layers[i] + 1, reverse_key),
        )
        for i in range(depth)
    ]


def middle_from_settings(settings: Mapping[str, Any]) -> Middle:
    """Return the middle block: diffusers has two kinds, and UNets without it."""
    kind, blocks = settings["mid_block_type"], settings["transformer_layers_per_block"]
    if kind is None:
        return Middle(resnets=0, transformers=0)
    if kind == "UNetMidBlock2D":
        return Middle(resnets=1, transformers=0)
    last = blocks[-1] if isinstance(blocks, list) else blocks
    return Middle(resnets=2, transformers=last[0] if isinstance(last, list) else last)
