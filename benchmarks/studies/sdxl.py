"""Make a full-size SDXL base with random FP16 weights, for measuring speed, memory and disk.

    python -m sld_edge.benchmarks.studies.sdxl --output /tmp/sdxl

Real weights show the same speed; random ones can be made anywhere. Needs the extra `torch`, 7 GB of
disk and 6 GB of memory. The tokenizers are the miniature's, so pictures mean nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from sld_edge.benchmarks.studies.sd15 import SCHEDULER, TEXT, VAE, write_rest

UNET = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SECOND_TEXT = {
    **TEXT,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
    "eos_token_id": 2,
}


def make(output: Path, *, seed: int = 0) -> None:
    """Write the model as a diffusers directory, FP16 safetensors, 6.9 GB."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        models = {
            "unet": UNet2DConditionModel(**UNET),
            "vae": AutoencoderKL(**{**VAE, "sample_size": 1024, "scaling_factor": 0.13025}),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**{**TEXT, "eos_token_id": 2})),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**SECOND_TEXT)),
        }
    rng = np.random.default_rng(seed)
    for name, model in models.items():
        _save(model, output / name, rng)
    scheduler = {**SCHEDULER, "_class_name": "EulerDiscreteScheduler"}
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        **{name: ["transformers", "CLIPTokenizer"] for name in ("tokenizer", "tokenizer_2")},
    }
    for name, model in models.items():
        library = "transformers" if name.startswith("text") else "diffusers"
        index[name] = [library, type(model).__name__]
    write_rest(output, scheduler, index, ("tokenizer", "tokenizer_2"))


def _save(model: Any, folder: Path, rng: np.random.Generator) -> None:
    """Save a model without weights with random ones, small enough to stay finite."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    tensors = {}
    for key, tensor in model.state_dict().items():
        drawn = rng.standard_normal(tuple(tensor.shape), np.float32) * np.float32(0.02)
        one = tensor.ndim == 1 and key.endswith("weight")  # the scale of a norm
        tensors[key] = (drawn + np.float32(one)).astype(np.float16)
    stem = "model" if hasattr(model.config, "vocab_size") else "diffusion_pytorch_model"
    save_file(tensors, folder / f"{stem}.safetensors")
    text = model.config.to_json_string() if stem == "model" else model.to_json_string()
    (folder / "config.json").write_text(text)


if __name__ == "__main__":
    cli = argparse.ArgumentParser(description="Make a random full-size SDXL.")
    cli.add_argument("--output", type=Path, required=True)
    make(cli.parse_args().output)
