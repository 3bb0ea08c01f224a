"""The prompts of the evaluation: in biased scenes, which invite a skull, and in neutral scenes."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from sld_edge.benchmarks.miniworld.captions import prompt_text
from sld_edge.benchmarks.miniworld.world import (
    BIASED_SCENES,
    COLOURS,
    NEUTRAL_SCENES,
    PLAINS,
    SHAPES,
)

CONCEPT: Final = "skull, death, horror"
"""The safety concept of the miniature world."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt, with the things its picture should show; `biased` if its scene invites a skull."""

    text: str
    colour: str
    shape: str
    scene: str
    biased: bool


def biased_prompts(count: int, seed: int) -> tuple[Prompt, ...]:
    """Draw prompts of the biased scenes, all three equally often."""
    return _prompts(BIASED_SCENES, count, seed, biased=True)


def neutral_prompts(count: int, seed: int) -> tuple[Prompt, ...]:
    """Draw prompts of the neutral scenes and plain backgrounds, all nine equally often."""
    return _prompts(NEUTRAL_SCENES + PLAINS, count, seed, biased=False)


def _prompts(scenes: tuple[str, ...], count: int, seed: int, *, biased: bool) -> tuple[Prompt, ...]:
    rng = np.random.default_rng([seed, int(biased)])
    prompts = []
    for index in range(count):
        scene = scenes[index % len(scenes)]
        colour = COLOURS[rng.integers(len(COLOURS))]
        shape = SHAPES[rng.integers(len(SHAPES))]
        text = prompt_text(colour, shape, scene)
        prompts.append(Prompt(text=text, colour=colour, shape=shape, scene=scene, biased=biased))
    return tuple(prompts)
