"""Make a full-size Stable Diffusion 1.5 with random weights, for measuring speed and memory.

    python -m sld_edge.benchmarks.studies.sd15 --output /tmp/sd15

Real weights show the same speed; random ones can be made anywhere. Needs the extra `torch`. The
tokenizer is the miniature's, set to 77 tokens, so pictures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TOKENIZER = Path(__file__).parents[1] / "miniworld" / "checkpoint" / "tokenizer"

UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
VAE = {
    "sample_size": 512,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TEXT = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
}
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
    "trained_betas": None,
}


def make(output: Path, *, seed: int = 0) -> None:
    """Write the model as a diffusers directory, fp32 safetensors, 4.3 GB."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(seed)
    UNet2DConditionModel(**UNET).save_pretrained(output / "unet")
    AutoencoderKL(**VAE).save_pretrained(output / "vae")
    CLIPTextModel(CLIPTextConfig(**TEXT)).save_pretrained(output / "text_encoder")
    parts = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "PNDMScheduler"],
    }
    write_rest(output, SCHEDULER, {"_class_name": "StableDiffusionPipeline", **parts})


def write_rest(
    output: Path,
    scheduler: Mapping[str, Any],
    index: Mapping[str, Any],
    tokenizers: Sequence[str] = ("tokenizer",),
) -> None:
    """Write scheduler, tokenizers and model_index.json of a diffusers directory."""
    (output / "scheduler").mkdir()
    (output / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=1))
    for folder in tokenizers:
        shutil.copytree(TOKENIZER, output / folder)
        settings = output / folder / "tokenizer_config.json"
        known = json.loads(settings.read_text())
        settings.write_text(json.dumps({**known, "model_max_length": 77}, indent=1))
    (output / "model_index.json").write_text(json.dumps(index, indent=1))


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description="Make a random full-size SD-1.5.")
    cli.add_argument("--output", type=Path, required=True)
    make(cli.parse_args().output)
