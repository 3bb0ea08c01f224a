"""What a UNet is fed, and diffusers' call of it for each branch: nothing is shared there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from diffusers import LatentConsistencyModelPipeline
from numpy.typing import NDArray

from oracles.models import POOLED_WIDTH

Feeds = dict[str, NDArray[Any]]

IMAGES, TOKENS = 2, 7
# Original height and width, the crop's top and left, target height and width.
_TIME_IDS = [[1024, 768, 0, 128, 1000, 752], [512, 640, 32, 0, 480, 608]]


def feeds_for(model: Any, branches: int, height: int = 8, width: int = 8) -> Feeds:
    """Return random inputs of two images, whose rows differ."""
    rng = np.random.default_rng(branches)
    rows = branches * IMAGES
    feeds: Feeds = {
        "latents": rng.standard_normal((IMAGES, 4, height, width), np.float32),
        "timestep": np.array([981, 13], np.float32),
        "context": rng.standard_normal(
            (rows, TOKENS, model.config.cross_attention_dim), np.float32
        ),
    }
    if model.config.addition_embed_type is not None:
        feeds["pooled"] = rng.standard_normal((rows, POOLED_WIDTH), np.float32)
        feeds["time_ids"] = np.array(_TIME_IDS, np.float32)
    if model.config.time_cond_proj_dim is not None:
        feeds["guidance_embedded"] = np.array([7.5, 0.25], np.float32)
    return feeds


def calls_of(model: Any, feeds: Feeds) -> Iterator[dict[str, Any]]:
    """Give the arguments of one diffusers call a branch."""
    tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
    dim = model.config.time_cond_proj_dim
    for i, context in enumerate(tensors["context"].split(IMAGES)):
        call: dict[str, Any] = {
            "sample": tensors["latents"],
            "timestep": tensors["timestep"],
            "encoder_hidden_states": context,
        }
        if "pooled" in tensors:
            call["added_cond_kwargs"] = {
                "text_embeds": tensors["pooled"].split(IMAGES)[i],
                "time_ids": tensors["time_ids"],
            }
        if dim is not None:
            call["timestep_cond"] = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
                None, tensors["guidance_embedded"], embedding_dim=dim
            )
        yield call


def predicted(model: Any, feeds: Feeds) -> NDArray[Any]:
    """Return diffusers' noise_pred of all branches."""
    return np.concatenate([model(**call).sample.numpy() for call in calls_of(model, feeds)])
