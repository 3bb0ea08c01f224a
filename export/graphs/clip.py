"""CLIP's text encoder, as transformers' CLIPTextModel and CLIPTextModelWithProjection define it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sld_edge.export.checkpoints.config import (
    MOST_POSITIONS,
    Key,
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

TEXT_PROJECTION = "text_projection.weight"
_END_OF_OLD_CONFIGS = 2  # an error in old configs of transformers: the end token is the largest id

# Keys of text generation, training and bookkeeping, which transformers 4 wrote into every config.
_NO_DIFFERENCE = """
    architectures attention_dropout bad_words_ids begin_suppress_tokens bos_token_id
    decoder_start_token_id diversity_penalty do_sample dropout dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing id2label initializer_factor
    initializer_range label2id length_penalty max_length min_length no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states
    output_scores pad_token_id prefix problem_type projection_dim remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_word_embeddings tokenizer_class top_k top_p
    torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache
"""
TOWER_KEYS: dict[str, Key] = {
    "num_hidden_layers": count(12),
    "hidden_act": one_of("quick_gelu", "gelu"),
    "layer_norm_eps": number(1e-5),
    # Features that must be off.
    **dict.fromkeys(
        ("add_cross_attention", "is_decoder", "is_encoder_decoder", "tie_encoder_decoder"),
        one_of(False),
    ),
    "chunk_size_feed_forward": one_of(0),
    "cross_attention_hidden_size": one_of(None),
    "pruned_heads": one_of(None, {}),
    "quantization_config": one_of(None),
    **dict.fromkeys(_NO_DIFFERENCE.split(), anything()),
}
TEXT_KEYS: dict[str, Key] = {
    **TOWER_KEYS,
    "vocab_size": count(49408),
    "hidden_size": count(512),
    "intermediate_size": count(2048),
    "num_attention_heads": count(8),
    "max_position_embeddings": count(77, MOST_POSITIONS),
    "model_type": one_of("clip_text_model"),
}
# Pooling looks for the end token, so its id counts.
POOLED_TEXT_KEYS: dict[str, Key] = {
    **TEXT_KEYS,
    "eos_token_id": Key(
        None, lambda value: value is None or type(value) is int, "a whole number or null"
    ),
}


def write_text_encoder(
    config: Mapping[str, Any],
    weights: Weights,
    options: GraphOptions,
    path: Path,
    *,
    layer: Literal["last", "penultimate"] = "last",
    pooled: bool = False,
) -> None:
    """Write the encoder: input_ids i64 [N,L] -> hidden_states f32 [N,L,C], pooled f32 [N,P].

    L is `max_position_embeddings`. With `layer` "last" the states come from the last layer, after
    the last norm; with "penultimate" from the layer before it, without a norm, as SDXL reads both
    its encoders. Where `pooled`, the second output is the state of the first end token after the
    last norm, projected to P (`projection_dim`).

    Raises a CheckpointError that names a config key or tensor which is unknown, missing or bad.
    Source: transformers, models/clip/modeling_clip.py, CLIPTextModel and, where `pooled`,
    CLIPTextModelWithProjection.
    """
    keys = {**POOLED_TEXT_KEYS, "projection_dim": count(512)} if pooled else TEXT_KEYS
    settings = checked_config(config, keys, name=weights.name)
    length, width = settings["max_position_embeddings"], settings["hidden_size"]
    # Published files have the prefix; files that transformers 5 saves lack it.
    names = weights.keys()
    root = "text_model." if any(name.startswith("text_model.") for name in names) else ""
    with GraphBuilder(path, options, weights) as b:
        b.weights.ignore([f"{root}embeddings.position_ids"])  # a buffer that holds 0, 1, 2, ...
        ids = b.input("input_ids", np.int64, ["N", length])
        x = text_embeddings(b, ids, f"{root}embeddings", settings)
        last = f"{root}encoder.layers.{settings['num_hidden_layers'] - 1}"
        for i in range(settings["num_hidden_layers"] - 1):
            x = clip_layer(b, x, f"{root}encoder.layers.{i}", settings, causal_length=length)
        hidden = x
        if layer == "last" or pooled:
            x = clip_layer(b, x, last, settings, causal_length=length)
            x = layer_norm(b, x, f"{root}final_layer_norm", width, settings["layer_norm_eps"])
        else:
            # The checkpoint holds the last layer, but no output depends on it.
            unused = (f"{last}.", f"{root}final_layer_norm.")
            b.weights.ignore(name for name in names if name.startswith(unused))
        if layer == "last":
            hidden = x
        b.output(b.outer(hidden), "hidden_states", np.float32, ["N", length, width])
        if pooled:
            dim = settings["projection_dim"]
            y = pooled_text(b, x, ids, settings, dim, name="end/state")
            b.output(b.outer(y), "pooled", np.float32, ["N", dim])


def pooled_text(
    b: GraphBuilder, x: Value, ids: Value, settings: Mapping[str, Any], dim: int, *, name: str
) -> Value:
    """Project the state of each text's first end token: x [N,L,C] after the last norm to [N,dim].

    `name` names the state before the projection.
    """
    end_token = settings["eos_token_id"]
    if end_token not in (None, _END_OF_OLD_CONFIGS, settings["vocab_size"] - 1):
        # The vocabulary has added tokens, so the end token is no longer the largest id.
        constant = b.constant(np.array(end_token, np.int64), "number/end_token")
        ids = b.cast(b.node("Equal", ids, constant, name="end/each"), np.int32, "end/is")
    end = b.node("ArgMax", ids, name="end", rank=2, axis=1, keepdims=1)
    x = b.node("GatherND", x, end, name=name, rank=2, batch_dims=1)
    return projection(b, x, TEXT_PROJECTION, settings["hidden_size"], dim)


def projection(b: GraphBuilder, x: Value, key: str, width: int, dim: int) -> Value:
    """Linear layer without bias, [N,width] to [N,dim]; `key` is its weight's full name."""
    return b.node("MatMul", x, b.weight(key, (dim, width), transpose=True), name=key)


def text_embeddings(b: GraphBuilder, ids: Value, key: str, settings: Mapping[str, Any]) -> Value:
    """Look up tokens [N,L] and add the embeddings of their positions: [N,L,C]."""
    length, width = settings["max_position_embeddings"], settings["hidden_size"]
    table = b.stored_weight(f"{key}.token_embedding.weight", (settings["vocab_size"], width))
    # Cast after the look-up: the table is a third of the model.
    x = b.node("Gather", table, ids, name=f"{key}.token_embedding", rank=3)
    if b.storage != b.dtype:
        x = b.cast(x, b.dtype, f"{key}.token_embedding/inner")
    positions = b.weight(f"{key}.position_embedding.weight", (length, width))
    return b.node("Add", x, positions, name=key)


def clip_layer(
    b: GraphBuilder, x: Value, key: str, settings: Mapping[str, Any], *, causal_length: int | None
) -> Value:
    """A transformer layer of a CLIP tower; with `causal_length` its attention looks only back."""
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
