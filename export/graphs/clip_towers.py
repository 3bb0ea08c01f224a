"""CLIP's two towers with their projections, as transformers' CLIPModel defines them.

Tensors have the names that they have within a tower, whichever model they came from, so that the
same weights make the same file, and scorers made from different checkpoints share it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sld_edge.engines.errors import CheckpointError
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
from sld_edge.export.graphs.clip import clip_layer, text_embeddings
from sld_edge.export.graphs.layers import layer_norm, tokens_from_image

IMAGE_PROJECTION, TEXT_PROJECTION = "visual_projection.weight", "text_projection.weight"
# What transformers 4 wrote into every part of a config; of text generation, training, bookkeeping.
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
_MOST_PIXELS = 1024  # of the side of a picture that a tower sees
_COMMON: dict[str, Key] = {
    "num_hidden_layers": count(12),
    "hidden_act": one_of("quick_gelu", "gelu"),
    "layer_norm_eps": number(1e-5),
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
_IMAGE_KEYS: dict[str, Key] = {
    **_COMMON,
    "hidden_size": count(768),
    "intermediate_size": count(3072),
    "num_attention_heads": count(12),
    "image_size": count(224, _MOST_PIXELS),
    "patch_size": count(32),
    "num_channels": one_of(3),
    "model_type": one_of("clip_vision_model"),
}
_TEXT_KEYS: dict[str, Key] = {
    **_COMMON,
    "vocab_size": count(49408),
    "hidden_size": count(512),
    "intermediate_size": count(2048),
    "num_attention_heads": count(8),
    "max_position_embeddings": count(77, MOST_POSITIONS),
    "model_type": one_of("clip_text_model"),
}


def image_settings(config: Mapping[str, Any], *, name: str) -> dict[str, Any]:
    """Return a vision config with defaults filled in; CheckpointError for what is not known."""
    settings = checked_config(config, _IMAGE_KEYS, name=name)
    if settings["image_size"] % settings["patch_size"]:
        raise CheckpointError(
            f"{name}: config key image_size",
            got=settings["image_size"],
            expected=f"a multiple of patch_size {settings['patch_size']}",
        )
    return settings


def text_settings(config: Mapping[str, Any], *, name: str) -> dict[str, Any]:
    """Return a text config with defaults filled in; CheckpointError for what is not known.

    The end token must be the largest id, as in CLIP's vocabulary: the tower looks for that.
    """
    settings = checked_config(config, _TEXT_KEYS, name=name)
    last = settings["vocab_size"] - 1
    if settings["eos_token_id"] not in (None, 2, last):  # 2 is a known slip of old configs
        raise CheckpointError(
            f"{name}: config key eos_token_id", got=settings["eos_token_id"], expected=last
        )
    return settings


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
        x = layer_norm(b, x, "pre_layrnorm", width, eps)  # spelled so in every checkpoint
        for i in range(settings["num_hidden_layers"]):
            x = clip_layer(b, x, f"encoder.layers.{i}", settings, causal_length=None)
        first = b.constant(np.array(0, np.int64), "number/first")
        x = b.node("Gather", x, first, name="pooled", rank=2, axis=1)
        x = layer_norm(b, x, "post_layernorm", width, eps)
        _project(b, x, IMAGE_PROJECTION, width, dim, "B")


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
        end = b.node("ArgMax", ids, name="end", rank=2, axis=1, keepdims=1)
        x = b.node("GatherND", x, end, name="pooled", rank=2, batch_dims=1)
        _project(b, x, TEXT_PROJECTION, width, dim, "N")


def _project(b: GraphBuilder, x: Value, key: str, width: int, dim: int, batch: str) -> None:
    y = b.node("MatMul", x, b.weight(key, (dim, width), transpose=True), name=key)
    b.output(b.outer(y), "embedding", np.float32, [batch, dim])
