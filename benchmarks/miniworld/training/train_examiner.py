"""Train the examiner alone, from the VAE of the shipped checkpoint, in one command.

    python -m sld_edge.benchmarks.miniworld.training.train_examiner --output examiner.onnx

The command may be stopped and run again: the training goes on from a file beside the output. The
answers on held-out pictures are printed at the end.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from diffusers import AutoencoderKL

from sld_edge.benchmarks.miniworld.training.judge import (
    accuracy,
    exam,
    export_judge,
    new_examiner,
    round_trip,
    train_judge,
)

VAE: Final = Path(__file__).parents[1] / "checkpoint" / "vae"
SEED: Final = 7_001  # train.py uses 1 to 3
POOL: Final = 10_000
STEPS: Final = 2_000
HELD_OUT: Final = 2_000


def train_examiner(
    path: Path, *, pool: int = POOL, steps: int = STEPS, held_out: int = HELD_OUT, seed: int = SEED
) -> dict[str, float]:
    """Train or go on, write the network to `path`, and return its shares of right answers."""
    vae = AutoencoderKL.from_pretrained(VAE, torch_dtype=torch.float32).eval()
    examiner = train_judge(
        new_examiner, vae, path.with_suffix(".pt"), pool=pool, steps=steps, seed=seed
    )
    export_judge(examiner, path)
    questions = exam(held_out, seed + 1)
    decoded = replace(questions, pixels=round_trip(vae, questions.pixels))
    return {
        f"{kind}_{head}": share
        for kind, asked in (("real", questions), ("round_trip", decoded))
        for head, share in accuracy(examiner, asked).items()
    }


def main() -> None:
    """Train with the standard settings."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(json.dumps(train_examiner(arguments.output), indent=2))


if __name__ == "__main__":
    main()
