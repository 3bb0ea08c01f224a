"""The trained parts as a diffusers directory in float16."""

import copy
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from sld_edge.benchmarks.miniworld.training.models import TOKENS, new_scheduler
from sld_edge.benchmarks.miniworld.training.vocabulary import write_tokenizer


def write_checkpoint(
    folder: Path,
    *,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    scaling_factor: float,
) -> None:
    """Write copies of the parts in float16; `scaling_factor` goes into the VAE's config."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    write_tokenizer(fresh / "tokenizer", tokens=TOKENS)
    vae = copy.deepcopy(vae)
    vae.register_to_config(scaling_factor=round(scaling_factor, 6))
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=copy.deepcopy(text_encoder),
        tokenizer=CLIPTokenizer.from_pretrained(fresh / "tokenizer"),
        unet=copy.deepcopy(unet),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(torch.float16).save_pretrained(fresh)
    shutil.rmtree(fresh / "tokenizer")
    write_tokenizer(fresh / "tokenizer", tokens=TOKENS)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.replace(folder)
