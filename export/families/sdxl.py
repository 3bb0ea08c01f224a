"""Stable Diffusion XL, base models and models distilled from them (arXiv 2307.01952)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from sld_edge.engines.errors import CheckpointError
from sld_edge.export.checkpoints.checkpoint import Checkpoint, size_from_config
from sld_edge.export.families.family import Family, Inputs, Part, require_equal
from sld_edge.export.families.sd import DECODER as SD_DECODER
from sld_edge.export.families.sd import GUIDANCE_PART, PREVIEW, UNET, guidance_inputs, write_text
from sld_edge.export.graphs.unet_settings import pooled_width, unet_settings
from sld_edge.runtime.manifest import SIZE, Absent, Condition


def _inputs(checkpoint: Checkpoint) -> Inputs:
    models = checkpoint.models
    require_equal(
        "text width",
        {
            "unet": size_from_config(models["unet"], "cross_attention_dim"),
            "text encoders": size_from_config(models["text_encoder"], "hidden_size")
            + size_from_config(models["text_encoder_2"], "hidden_size"),
        },
    )
    settings = unet_settings(models["unet"].config, name="unet")
    embedding = settings["addition_embed_type"]
    if embedding != "text_time":
        raise CheckpointError(
            "unet: config key addition_embed_type", got=embedding, expected="text_time"
        )
    require_equal(
        "width of the pooled text",
        {
            "unet": pooled_width(settings, name="unet"),
            "text_encoder_2": size_from_config(models["text_encoder_2"], "projection_dim"),
        },
    )
    embedded, guidance = guidance_inputs(checkpoint)
    # The default is diffusers'.
    zeros = checkpoint.index.get("force_zeros_for_empty_prompt", True)
    if not isinstance(zeros, bool):
        raise CheckpointError(
            "model_index.json: force_zeros_for_empty_prompt", got=zeros, expected="true or false"
        )
    absent: Absent = "zeros" if zeros else "encode"
    states = tuple(f"{name}.hidden_states" for name in ("text_encoder", "text_encoder_2"))
    return Inputs(
        conditioning={
            "context": Condition(per="branch", sources=states, absent=absent),
            "pooled": Condition(per="branch", sources=("text_encoder_2.pooled",), absent=absent),
            "time_ids": Condition(per="image", sources=(SIZE,)),
            **embedded,
        },
        guidance=guidance,
    )


SDXL = Family(
    name="Stable Diffusion XL",
    folders=("unet", "vae", "text_encoder", "text_encoder_2"),
    parts=(
        Part(
            name="text_encoder",
            folder="text_encoder",
            write=partial(write_text, layer="penultimate"),
        ),
        Part(
            name="text_encoder_2",
            folder="text_encoder_2",
            write=partial(write_text, layer="penultimate", pooled=True),
        ),
        *UNET,
        replace(SD_DECODER, precision="fp32"),  # it overflows in FP16
        PREVIEW,
        GUIDANCE_PART,
    ),
    inputs=_inputs,
)
