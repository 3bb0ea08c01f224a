"""CLIP's two towers with their projections, as transformers' CLIPModel defines them.

Tensors have their names within a tower, without the model's prefix. So the same weights make the
same file, and scorers from different checkpoints share it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sld_edge.engines.errors import CheckpointError
from sld_edge.export.checkpoints.config import (
    Key,
    checked_config,
    count,
    one_of,
)
from sld_edge.export.checkpoints.weights import Weights
from sld_edge.export.graphs.builder import GraphBuilder, GraphOptions
from sld_edge.export.graphs.clip import (
    POOLED_TEXT_KEYS,
    TOWER_KEYS,
    clip_layer,
    pooled_text,
    projection,
    text_embeddings,
)
from sld_edge.export.graphs.layers import layer_norm, tokens_from_image

IMAGE_PROJECTION = "visual_projection.weight"
_MOST_PIXELS = 1024  # side of a picture
_IMAGE_KEYS: dict[str, Key] = {
    **TOWER_KEYS,
    "hidden_size": count(768),
    "intermediate_size": count(3072),
    "num_attention_heads": count(12),
    "image_size": count(224, _MOST_PIXELS),
    "patch_size": count(32),
    "num_channels": one_of(3),
    "model_type": one_of("clip_vision_model"),
}


def image_settings(config: Mapping[str, Any], *, name: str) -> dict[str, Any]:
    """Return a vision config with defaults filled in; unknown keys are a CheckpointError."""
    settings = checked_config(config, _IMAGE_KEYS, name=name)
    if settings["image_size"] % settings["patch_size"]:
        raise CheckpointError(
            f"{name}: config key image_size",
            got=settings["image_size"],
            expected=f"a multiple of patch_size {settings['patch_size']}",
        )
    return settings


def text_settings(config: Mapping[str, Any], *, name: str) -> dict[str, Any]:
    """Return a text config with defaults filled in; unknown keys are a CheckpointError."""
    return checked_config(config, POOLED_TEXT_KEYS, name=name)


def write_image_encoder(
    settings: Mapping[str, Any], weights: Weights, dim: int, options: GraphOptions, path: Path
) -> None:
    """Write the image tower: pixels f32 [B,3,S,S], normalized -> embedding f32 [B,dim].

    Raises CheckpointError for a tensor that is unknown, missing or bad. Source: transformers,
    models/clip/modeling_clip.py, CLIPVisionModelWithProjection.
    """
    width, size, patch = (settings[key] for key in ("hidden_size", "image_size", "patch_size"))
    positions = (size // patch) ** 2 + 1
    eps = settings["layer_norm_eps"]
    with GraphBuilder(path, options, weights) as b:
        b.weights.ignore(["embeddings.position_ids"])  # a buffer that holds 0, 1, 2, ...
        pixels = b.input("pixels", np.float32, ["B", 3, size, size])
        key = "embeddings.patch_embedding"
        x = b.node(
            "Conv",
            b.inner(pixels),
            b.weight(f"{key}.weight", (width, 3, patch, patch)),
            name=key,
            kernel_shape=[patch, patch],
            strides=[patch, patch],
        )
        x = tokens_from_image(b, x, width, key)
        key = "embeddings.class_embedding"
        b.weights.reshaped(key, (1, 1, width))
        shape = b.node("Concat", b.sizes(x, 0, 1), b.ints(1, width), name=f"{key}/shape", axis=0)
        start = b.node("Expand", b.weight(key, (1, 1, width)), shape, name=f"{key}/each", rank=3)
        x = b.node("Concat", start, x, name="embeddings/tokens", axis=1)
        x = b.node(
            "Add",
            x,
            b.weight("embeddings.position_embedding.weight", (positions, width)),
            name="embeddings",
        )
        x = layer_norm(b, x, "pre_layrnorm", width, eps)  # checkpoints spell it so
        for i in range(settings["num_hidden_layers"]):
            x = clip_layer(b, x, f"encoder.layers.{i}", settings, causal_length=None)
        first = b.constant(np.array(0, np.int64), "number/first")
        x = b.node("Gather", x, first, name="pooled", rank=2, axis=1)
        x = layer_norm(b, x, "post_layernorm", width, eps)
        y = projection(b, x, IMAGE_PROJECTION, width, dim)
        b.output(b.outer(y), "embedding", np.float32, ["B", dim])


def write_prompt_encoder(
    settings: Mapping[str, Any], weights: Weights, dim: int, options: GraphOptions, path: Path
) -> None:
    """Write the text tower: input_ids i64 [N,L] -> embedding f32 [N,dim], of the first end token.

    Raises CheckpointError for a tensor that is unknown, missing or bad. Source: transformers,
    models/clip/modeling_clip.py, CLIPTextModelWithProjection.
    """
    width, length = settings["hidden_size"], settings["max_position_embeddings"]
    with GraphBuilder(path, options, weights) as b:
        b.weights.ignore(["embeddings.position_ids"])
        ids = b.input("input_ids", np.int64, ["N", length])
        x = text_embeddings(b, ids, "embeddings", settings)
        for i in range(settings["num_hidden_layers"]):
            x = clip_layer(b, x, f"encoder.layers.{i}", settings, causal_length=length)
        x = layer_norm(b, x, "final_layer_norm", width, settings["layer_norm_eps"])
        y = pooled_text(b, x, ids, settings, dim, name="pooled")
        b.output(b.outer(y), "embedding", np.float32, ["N", dim])
