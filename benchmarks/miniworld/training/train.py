"""Train the miniature from nothing, in one command that may be stopped and run again.

    python -m sld_edge.benchmarks.miniworld.training.train --output DIR

Writes DIR/checkpoint (a diffusers directory) and DIR/judge.onnx. A stopped run goes on from
DIR/state. Every schedule counts steps, never time.
"""

import argparse
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import CLIPTokenizer

from sld_edge.benchmarks.miniworld.training.checkpoint import write_checkpoint
from sld_edge.benchmarks.miniworld.training.judge import (
    accuracy,
    exam,
    export_judge,
    new_judge,
    round_trip,
    train_judge,
)
from sld_edge.benchmarks.miniworld.training.models import TOKENS
from sld_edge.benchmarks.miniworld.training.pictures import picture_set
from sld_edge.benchmarks.miniworld.training.train_unet import Denoiser, train_unet
from sld_edge.benchmarks.miniworld.training.train_vae import latents_from_pixels, train_vae
from sld_edge.benchmarks.miniworld.training.vocabulary import write_tokenizer
from sld_edge.runtime.picture import psnr

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The lengths of the stages."""

    seed: int = 1
    pictures: int = 20_000
    vae_steps: int = 7_000
    unet_steps: int = 4_000
    judge_pool: int = 12_000
    judge_steps: int = 2_500


def train(output: Path, settings: Settings) -> dict[str, float]:
    """Run or go on with every stage, write the results and return the measurements."""
    state = output / "state"
    state.mkdir(parents=True, exist_ok=True)
    measured: dict[str, float] = {}
    pictures, pixels = picture_set(settings.pictures, settings.seed)
    vae = train_vae(pixels, state, steps=settings.vae_steps, seed=settings.seed)
    held_out = exam(1_000, settings.seed + 1)
    decoded = round_trip(vae, held_out.pixels)
    measured["vae_psnr_db"] = psnr(held_out.pixels, decoded)

    latents_path = state / "latents.pt"
    if not latents_path.exists():
        torch.save(latents_from_pixels(vae, pixels), latents_path)
    latents = torch.load(latents_path, weights_only=True)
    scaling_factor = round(1 / float(latents.std()), 6)
    write_tokenizer(state / "tokenizer", tokens=TOKENS)
    denoiser = Denoiser(CLIPTokenizer.from_pretrained(state / "tokenizer"), settings.seed)
    train_unet(
        denoiser,
        latents * scaling_factor,
        pictures,
        state,
        steps=settings.unet_steps,
        seed=settings.seed,
    )
    write_checkpoint(
        output / "checkpoint",
        vae=vae,
        unet=denoiser.unet,
        text_encoder=denoiser.text,
        scaling_factor=scaling_factor,
    )

    judge = train_judge(
        new_judge,
        vae,
        state / "judge.pt",
        pool=settings.judge_pool,
        steps=settings.judge_steps,
        seed=settings.seed + 2,
    )
    export_judge(judge, output / "judge.onnx")
    for kind, shown in (("real", held_out.pixels), ("round_trip", decoded)):
        answers = accuracy(judge, replace(held_out, pixels=shown))
        measured.update({f"judge_{kind}_{head}": share for head, share in answers.items()})
    text = json.dumps(measured, indent=2)
    (output / "measured.json").write_text(text + "\n", encoding="utf-8")
    _log.info("measured %s", text)
    return measured


def main() -> None:
    """Train with the standard settings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    train(arguments.output, Settings(seed=arguments.seed))


if __name__ == "__main__":
    main()
