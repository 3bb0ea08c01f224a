"""Stable Diffusion 1.x and 2.x, their smaller copies, and models distilled from them.

Functions import the graph builders, so that a list of parts needs no onnx.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sld_edge.export.checkpoints.checkpoint import (
    PREVIEW_VAE,
    Checkpoint,
    Model,
    is_tiny,
    size_from_config,
)
from sld_edge.export.families.family import Family, Inputs, Part, require_equal
from sld_edge.runtime.bundle import own_graph
from sld_edge.runtime.manifest import GUIDANCE, PREVIEW_DECODER, SHALLOW, Condition, GuidanceKind

if TYPE_CHECKING:
    from sld_edge.export.graphs.builder import GraphOptions


def write_text(model: Model, options: GraphOptions, path: Path, **outputs: Any) -> None:
    """Write a text encoder; `outputs` are `layer` and `pooled` of `write_text_encoder`."""
    from sld_edge.export.graphs.clip import write_text_encoder

    write_text_encoder(model.config, model.weights, options, path, **outputs)


def _write_unet(model: Model, options: GraphOptions, path: Path) -> None:
    from sld_edge.export.graphs.unet import write_unet

    write_unet(model.config, model.weights, options, path)


def _write_shallow(model: Model, options: GraphOptions, path: Path) -> None:
    from sld_edge.export.graphs.shallow import write_shallow_unet

    write_shallow_unet(path.with_name("unet.onnx"), path)


def _write_decoder(model: Model, options: GraphOptions, path: Path) -> None:
    from sld_edge.export.graphs.vae import write_tiny_decoder, write_vae_decoder

    write = write_tiny_decoder if is_tiny(model) else write_vae_decoder
    write(model.config, model.weights, options, path)


def _copy_guidance(model: Model | None, options: GraphOptions, path: Path) -> None:
    shutil.copyfile(own_graph("guidance"), path)


UNET = (
    Part(name="unet", folder="unet", write=_write_unet),
    Part(name=SHALLOW, folder="unet", write=_write_shallow, weights_of="unet"),
)
DECODER = Part(name="vae_decoder", folder="vae", write=_write_decoder)
PREVIEW = Part(name=PREVIEW_DECODER, folder=PREVIEW_VAE, write=_write_decoder)
GUIDANCE_PART = Part(name="guidance", folder=None, write=_copy_guidance, precision="fp32")


def guidance_inputs(checkpoint: Checkpoint) -> tuple[dict[str, Condition], GuidanceKind]:
    """Return the input of the UNet's guidance embedding, if any, and the kind of guidance.

    A UNet distilled from guided predictions (LCM) takes guidance - 1 as an input, and no
    unconditional branch (arXiv 2310.04378, section 4.1).
    """
    if checkpoint.models["unet"].config.get("time_cond_proj_dim") is None:
        return {}, "classifier-free"
    condition = Condition(per="image", sources=(GUIDANCE,), offset=-1.0)
    return {"guidance_embedded": condition}, "embedded"


def _inputs(checkpoint: Checkpoint) -> Inputs:
    require_equal(
        "text width",
        {
            "unet": size_from_config(checkpoint.models["unet"], "cross_attention_dim"),
            "text_encoder": size_from_config(checkpoint.models["text_encoder"], "hidden_size"),
        },
    )
    embedded, guidance = guidance_inputs(checkpoint)
    context = Condition(per="branch", sources=("text_encoder.hidden_states",))
    return Inputs(conditioning={"context": context, **embedded}, guidance=guidance)


SD = Family(
    name="Stable Diffusion 1.x or 2.x",
    folders=("unet", "vae", "text_encoder"),
    parts=(
        Part(name="text_encoder", folder="text_encoder", write=write_text),
        *UNET,
        DECODER,
        PREVIEW,
        GUIDANCE_PART,
    ),
    inputs=_inputs,
)
