"""CLIP's text encoder, as transformers' CLIPTextModel defines it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sld_edge.export.checkpoints.config import (
    MOST_POSITIONS,
    anything,
    checked_config,
    count,
    number,
    one_of,
)
from sld_edge.export.checkpoints.weights import Weights
from sld_edge.export.graphs.builder import GraphBuilder, GraphOptions, Value
from sld_edge.export.graphs.layers import attention, gelu, layer_norm, linear, quick_gelu

_ACTIVATIONS: dict[str, Callable[[GraphBuilder, Value, str], Value]] = {
    "quick_gelu": quick_gelu,
    "gelu": gelu,
}

CLIP_KEYS = {
    "vocab_size": count(49408),
    "hidden_size": count(512),
    "intermediate_size": count(2048),
    "num_hidden_layers": count(12),
    "num_attention_heads": count(8),
    "max_position_embeddings": count(77, MOST_POSITIONS),
    "hidden_act": one_of("quick_gelu", "gelu"),
    "layer_norm_eps": number(1e-5),
    "model_type": one_of("clip_text_model"),
    # What must be off.
    **dict.fromkeys(
        ("add_cross_attention", "is_decoder", "is_encoder_decoder", "tie_encoder_decoder"),
        one_of(False),
    ),
    "chunk_size_feed_forward": one_of(0),
    "cross_attention_hidden_size": one_of(None),
    "pruned_heads": one_of(None, {}),
    "quantization_config": one_of(None),
    # What makes no difference to the hidden states: training, pooling, bookkeeping.
    **dict.fromkeys(
        (
            "architectures",
            "attention_dropout",
            "bos_token_id",
            "dropout",
            "dtype",
            "eos_token_id",
            "gradient_checkpointing",
            "id2label",
            "initializer_factor",
            "initializer_range",
            "label2id",
            "output_attentions",
            "output_hidden_states",
            "pad_token_id",
            "problem_type",
            "projection_dim",
            "return_dict",
            "tie_word_embeddings",
            "torch_dtype",
            "torchscript",
            "transformers_version",
            "use_bfloat16",
            "use_cache",
        ),
        anything(),
    ),
}


def write_text_encoder(
    config: Mapping[str, Any], weights: Weights, options: GraphOptions, path: Path
) -> None:
    """Write the encoder: input_ids i64 [N,L] -> hidden_states f32 [N,L,C], after the last norm.

    L is `max_position_embeddings`. Raises CheckpointError, naming it, for a config key or tensor
    that is unknown, missing or bad. Source: transformers, models/clip/modeling_clip.py.
    """
    settings = checked_config(config, CLIP_KEYS, name=weights.name)
    length, width = settings["max_position_embeddings"], settings["hidden_size"]
    eps = settings["layer_norm_eps"]
    # Published files have the prefix, those that transformers 5 saves have not.
    keys = weights.keys()
    root = "text_model." if any(key.startswith("text_model.") for key in keys) else ""
    with GraphBuilder(path, options, weights) as b:
        b.weights.ignore([f"{root}embeddings.position_ids"])  # a buffer that holds 0, 1, 2, ...
        ids = b.input("input_ids", np.int64, ["N", length])
        x = text_embeddings(b, ids, f"{root}embeddings", settings)
        for i in range(settings["num_hidden_layers"]):
            x = clip_layer(b, x, f"{root}encoder.layers.{i}", settings, causal_length=length)
        x = layer_norm(b, x, f"{root}final_layer_norm", width, eps)
        b.output(b.outer(x), "hidden_states", np.float32, ["N", length, width])


def text_embeddings(b: GraphBuilder, ids: Value, key: str, settings: Mapping[str, Any]) -> Value:
    """Look tokens [N,L] up and add their positions' embeddings: [N,L,C]."""
    length, width = settings["max_position_embeddings"], settings["hidden_size"]
    table = b.stored_weight(f"{key}.token_embedding.weight", (settings["vocab_size"], width))
    # Look up first, cast after: the table is a third of the model.
    x = b.node("Gather", table, ids, name=f"{key}.token_embedding", rank=3)
    if b.storage != b.dtype:
        x = b.cast(x, b.dtype, f"{key}.token_embedding/inner")
    positions = b.weight(f"{key}.position_embedding.weight", (length, width))
    return b.node("Add", x, positions, name=key)


def clip_layer(
    b: GraphBuilder, x: Value, key: str, settings: Mapping[str, Any], *, causal_length: int | None
) -> Value:
    """One transformer layer of a CLIP tower; the text's looks only back, over `causal_length`."""
    width, inner = settings["hidden_size"], settings["intermediate_size"]
    eps = settings["layer_norm_eps"]
    y = layer_norm(b, x, f"{key}.layer_norm1", width, eps)
    q, k, v = (linear(b, y, f"{key}.self_attn.{n}_proj", width, width) for n in "qkv")
    y = attention(
        b,
        q,
        k,
        v,
        heads=settings["num_attention_heads"],
        channels=width,
        name=f"{key}.self_attn",
        causal_length=causal_length,
    )
    y = linear(b, y, f"{key}.self_attn.out_proj", width, width)
    x = b.node("Add", x, y, name=f"{key}/after_attention")
    y = layer_norm(b, x, f"{key}.layer_norm2", width, eps)
    y = linear(b, y, f"{key}.mlp.fc1", width, inner)
    y = _ACTIVATIONS[settings["hidden_act"]](b, y, f"{key}.mlp.act")
    y = linear(b, y, f"{key}.mlp.fc2", inner, width)
    return b.node("Add", x, y, name=key)
