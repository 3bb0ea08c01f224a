"""What a caller asks for is resolved or refused, by name, before anything runs."""

from __future__ import annotations

from typing import Any

import pytest

from oracles.requests import flat_request
from sld_edge.runtime import InputError, Pipeline


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"steps": 0}, "steps | got 0"),
        ({"steps": -3}, "steps"),
        ({"steps": 1001}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"count": 0}, "count"),
        ({"sampler": "heun"}, "sampler | got 'heun' .*ddim, pndm"),
        ({"safety": "hard"}, "safety preset | got 'hard' .*off, weak"),
        ({"safety": 3}, "safety"),
        ({"safety": "off", "safety_concept": "x"}, "does nothing with safety off"),
        ({"safety_numbers": {"scale": -1.0}}, "safety scale"),
        ({"guidance_scale": float("nan")}, "guidance scale"),
        ({"guidance_scale": -1.0}, "guidance scale"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"seed": [1, 2]}, "seed | got 2 values"),
        ({"rng": "dice"}, "rng"),
        ({"eta": 2.0}, "eta"),
        ({"width": 65}, "width | got 65 .*multiple of 4"),
        ({"height": 0}, "height"),
        ({"width": 60_000, "height": 60_000}, "more than this machine's memory"),
        ({"prompts": ()}, "no prompt"),
        ({"prompts": ("\ud800",)}, "not valid Unicode"),
        ({"prompts": (b"a star",)}, "prompt | got bytes"),
    ],
)
def test_refused(miniature: Pipeline, asked: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says.replace(" | ", r" \| ")) as caught:
        miniature.resolve(flat_request(**{"prompts": ("a star",), **asked}))
    assert "\n" not in str(caught.value)


def test_defaults_come_from_the_bundle(miniature: Pipeline) -> None:
    plan = miniature.resolve(flat_request(prompts=("a star",)))
    defaults = miniature.bundle.manifest.defaults
    assert plan.steps == defaults.steps
    assert plan.table.name == defaults.sampler
    assert plan.images[0].preset == defaults.safety
    assert plan.images[0].guidance_scale == defaults.guidance_scale
    assert plan.images[0].concepts == miniature.bundle.manifest.safety_concepts


def test_zero_is_a_value_and_not_a_default(miniature: Pipeline) -> None:
    image = miniature.resolve(flat_request(prompts=("",), guidance_scale=0, seed=0)).images[0]
    assert (image.guidance_scale, image.seed, image.prompt) == (0.0, 0, "")


def test_every_prompt_starts_from_the_seed(miniature: Pipeline) -> None:
    plan = miniature.resolve(flat_request(prompts=("a", "b"), seed=6, count=2))
    assert [(image.prompt, image.seed) for image in plan.images] == [
        ("a", 6),
        ("a", 7),
        ("b", 6),
        ("b", 7),
    ]


def test_seeds_wrap_at_64_bits(miniature: Pipeline) -> None:
    plan = miniature.resolve(flat_request(prompts=("a",), seed=2**64 - 1, count=2))
    assert [image.seed for image in plan.images] == [2**64 - 1, 0]


def test_single_numbers_replace_a_presets(miniature: Pipeline) -> None:
    numbers = {"scale": 17.0, "warmup_steps": 2}
    plan = miniature.resolve(flat_request(prompts=("a",), safety="strong", safety_numbers=numbers))
    safety = plan.images[0].safety
    assert (safety.scale, safety.warmup_steps, safety.threshold) == (17.0, 2, 0.025)
    assert plan.images[0].preset == "custom"
