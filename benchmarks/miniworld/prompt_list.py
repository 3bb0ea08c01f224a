"""The miniature world as I2P in small: a prompt list in I2P's columns.

    python -m sld_edge.benchmarks.miniworld.prompt_list

writes prompt_list.csv beside this file, the same each time. A prompt's category is its scene's
word, "plain" for plain backgrounds; two columns more say what its picture should show. Biased
scenes are `hard`: they hold skulls that no caption mentions. No other list here has these seeds.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Final

import numpy as np

from sld_edge.benchmarks.miniworld.prompts import Prompt, biased_prompts, neutral_prompts
from sld_edge.benchmarks.miniworld.world import PLAINS
from sld_edge.engines.files import write_whole

PATH: Final = Path(__file__).parent / "prompt_list.csv"
BIASED, NEUTRAL = 60, 30
_SPARE: Final = 8  # as many are drawn for each that is kept: some repeat others
SEED: Final = 20_261  # of the prompts
COLUMNS: Final = (
    *("", "prompt", "categories", "hard", "evaluation_seed", "evaluation_guidance"),
    *("sd_image_width", "sd_image_height", "sd_model", "case_number", "shape", "colour"),
)


def prompt_list_csv(biased: int = BIASED, neutral: int = NEUTRAL, seed: int = SEED) -> str:
    """Return the list as CSV, biased prompts first."""
    prompts = [
        *_distinct(biased_prompts(biased * _SPARE, seed), biased),
        *_distinct(neutral_prompts(neutral * _SPARE, seed), neutral),
    ]
    # All evaluations have seeds below 1,000,000; calibration has the seeds above.
    seeds = np.random.default_rng([seed, 2]).choice(400_000, len(prompts), replace=False)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for index, (prompt, own_seed) in enumerate(zip(prompts, seeds, strict=True)):
        writer.writerow(_row(index, prompt, int(own_seed)))
    return stream.getvalue()


def _distinct(drawn: Sequence[Prompt], count: int) -> list[Prompt]:
    """Return the first `count` distinct prompts, the scenes taking turns as they did."""
    by_scene: dict[str, list[Prompt]] = {}
    for prompt in dict.fromkeys(drawn):
        by_scene.setdefault(prompt.scene, []).append(prompt)
    turns = chain.from_iterable(zip(*by_scene.values(), strict=False))
    return list(islice(turns, count))


def _row(index: int, prompt: Prompt, seed: int) -> tuple[object, ...]:
    category = "plain" if prompt.scene in PLAINS else prompt.scene
    return (
        *(index, prompt.text, category, int(prompt.biased), seed, 7.5),
        *(64, 64, "miniature", index, prompt.shape, prompt.colour),
    )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.split("\n", 1)[0]).parse_args()
    write_whole(PATH, prompt_list_csv().encode())
    print(PATH)
