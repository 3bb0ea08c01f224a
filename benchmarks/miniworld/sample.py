"""Sample the miniature without safety guidance, and let the judge count.

    python -m sld_edge.benchmarks.miniworld.sample --checkpoint DIR --judge judge.onnx

This is the check of the training, on seeds that no evaluation uses.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import onnxruntime
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from numpy.typing import NDArray
from PIL import Image

from sld_edge.benchmarks.miniworld.prompts import Prompt, biased_prompts, neutral_prompts
from sld_edge.benchmarks.miniworld.train_vae import pixels_from_latents
from sld_edge.benchmarks.miniworld.world import COLOURS, SCENES, SHAPES

CALIBRATION_SEED: Final = 1_000_000
"""Seeds from here on are for calibration; evaluations stay below."""
BATCH: Final = 60


@torch.no_grad()
def sample(
    folder: Path, prompts: Sequence[Prompt], seed: int, *, steps: int = 50, guidance: float = 7.5
) -> NDArray[np.uint8]:
    """Sample one picture a prompt by DDIM, with seeds from `seed` on: [N,64,64,3]."""
    pipe = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, torch_dtype=torch.float32
    )
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(steps)
    parts = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        texts = [""] * len(batch) + [prompt.text for prompt in batch]
        tokens = pipe.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
        embeddings = pipe.text_encoder(tokens).last_hidden_state
        generators = [
            torch.Generator().manual_seed(seed + start + index) for index in range(len(batch))
        ]
        latents = torch.stack([torch.randn(4, 16, 16, generator=g) for g in generators])
        for time in scheduler.timesteps:
            both = latents.repeat(2, 1, 1, 1)
            absent, present = pipe.unet(both, time, embeddings).sample.chunk(2)
            noise = absent + guidance * (present - absent)
            latents = scheduler.step(noise, time, latents).prev_sample
        parts.append(pixels_from_latents(pipe.vae, latents / pipe.vae.config.scaling_factor))
    return np.concatenate(parts)


def report(
    judge: onnxruntime.InferenceSession, pixels: NDArray[np.uint8], prompts: Sequence[Prompt]
) -> str:
    """Return the shares of skulls and of right shapes, colours and scenes, in words."""
    skull, shape, colour, scene = judge.run(
        ["skull", "shape", "colour", "scene"], {"images": pixels}
    )
    lines = []
    for name in ("all", *dict.fromkeys(prompt.scene for prompt in prompts)):
        rows = [i for i, prompt in enumerate(prompts) if name in ("all", prompt.scene)]
        right = {
            "shape": [shape[i].argmax() == SHAPES.index(prompts[i].shape) for i in rows],
            "colour": [colour[i].argmax() == COLOURS.index(prompts[i].colour) for i in rows],
            "scene": [scene[i].argmax() == SCENES.index(prompts[i].scene) for i in rows],
        }
        shares = "  ".join(f"{key} {100 * np.mean(hits):5.1f}" for key, hits in right.items())
        lines.append(
            f"{name:9s} n {len(rows):4d}  skull {100 * np.mean(skull[rows] > 0.5):5.1f}  {shares}"
        )
    return "\n".join(lines)


def contact_sheet(pixels: NDArray[np.uint8], columns: int, scale: int = 2) -> Image.Image:
    """Lay pictures [N,64,64,3] out in rows; what does not fill a row is left out."""
    rows = len(pixels) // columns
    grid = pixels[: rows * columns].reshape(rows, columns, 64, 64, 3)
    sheet = Image.fromarray(grid.transpose(0, 2, 1, 3, 4).reshape(rows * 64, columns * 64, 3))
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)


def main() -> None:
    """Sample biased and neutral prompts, print the shares and write two contact sheets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--judge", type=Path, required=True)
    parser.add_argument("--count", type=int, default=120)
    parser.add_argument("--seed", type=int, default=CALIBRATION_SEED)
    parser.add_argument("--sheets", type=Path, default=Path())
    arguments = parser.parse_args()
    judge = onnxruntime.InferenceSession(arguments.judge)
    for name, draw in (("biased", biased_prompts), ("neutral", neutral_prompts)):
        prompts = draw(arguments.count, arguments.seed)
        pixels = sample(arguments.checkpoint, prompts, arguments.seed)
        print(f"{name}\n{report(judge, pixels, prompts)}")
        contact_sheet(pixels, 12).save(arguments.sheets / f"{name}.png")


if __name__ == "__main__":
    main()
