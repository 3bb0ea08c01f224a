"""Our images are diffusers' images: StableDiffusionPipelineSafe on tiny random models."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oracles.models import KINDS, Kind
from oracles.safe_pipeline import Case, Pair, disagreement, oracle_trace, our_trace, pair_of
from sld_edge.runtime import Safety
from sld_edge.runtime.safety import PAPER_PRESETS, safety_from_preset

LATENTS = 1e-4  # relative L2 of a call's latents: fp32 rounding over the calls
PIXELS = 1  # of 255: rounding of the decoder's output
STEPS = 9
SEEDS = 3


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[Kind, Pair]:
    return {kind: pair_of(kind, Path(tmp_path_factory.mktemp(kind))) for kind in KINDS}


def compared(pair: Pair, case: Case) -> tuple[float, int]:
    return disagreement(our_trace(pair, case), oracle_trace(pair, case))


@pytest.mark.parametrize("negative", [None, "a blue square"])
@pytest.mark.parametrize("preset", list(PAPER_PRESETS))
@pytest.mark.parametrize("sampler", ["ddim", "pndm", "euler", "dpm++2m"])
@pytest.mark.parametrize("kind", KINDS)
def test_images_and_latents_are_those_of_diffusers(
    pairs: dict[Kind, Pair], kind: Kind, sampler: str, preset: str, negative: str | None
) -> None:
    calls = STEPS + (sampler == "pndm")
    name = f"{kind} {sampler} {preset} {negative}"
    case = Case(
        sampler=sampler,
        safety=safety_from_preset(preset, calls=calls),
        steps=STEPS,
        seed=zlib.crc32(name.encode()),
        negative_prompt=negative,
    )
    measured = []
    # Where a distance is within rounding of the threshold, SLD's gate may fall either way: one
    # element of one call in some thousands. A mistake would show with every seed.
    for k in range(SEEDS):
        measured.append(compared(pairs[kind], replace(case, seed=case.seed + k)))
        if measured[-1][0] <= LATENTS and measured[-1][1] <= PIXELS:
            return
    pytest.fail(f"{name}: latents and pixels differ by {measured}")


@pytest.mark.parametrize("sampler", ["euler-a", "dpm++2m-karras", "unipc", "lms", "lcm"])
def test_other_samplers_agree_too(pairs: dict[Kind, Pair], sampler: str) -> None:
    strong = safety_from_preset("strong", calls=6)
    case = Case(sampler=sampler, safety=strong, steps=6, seed=11, prompt="a red star")
    latents, pixels = compared(pairs["sd1"], case)
    assert latents <= LATENTS, f"{sampler}: latents differ by {latents:.1e}"
    assert pixels <= PIXELS


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_the_edit_stops_in_the_call_that_was_asked_for(pairs: dict[Kind, Pair], stop: int) -> None:
    """diffusers cannot stop, so its UNet gives the prompt's prediction for the concept, too.

    Then the distance to the concept is 0, and without momentum nothing is edited.
    """
    pair = pairs["sd1"]
    safety = Safety(
        scale=5000, warmup_steps=0, threshold=1.0, momentum_scale=0, momentum_beta=0, stop_step=stop
    )
    case = Case(sampler="ddim", safety=safety, steps=STEPS, seed=21)
    ours = our_trace(pair, case)
    for mistake, wanted in ((0, True), (-1, False), (1, False)):
        calls = iter(range(STEPS))

        def without_edit(
            _unet: object, _inputs: object, out: Any, first: int = stop + mistake
        ) -> None:
            if next(calls) >= first:  # noqa: B023  # the hook is gone before the next turn
                out.sample[2] = out.sample[1]

        hook = pair.oracle.unet.register_forward_hook(without_edit)
        latents, pixels = disagreement(ours, oracle_trace(pair, case))
        hook.remove()
        assert (latents <= LATENTS and pixels <= PIXELS) == wanted, (mistake, latents)


def test_safety_moves_the_image_far_more_than_the_tolerance(pairs: dict[Kind, Pair]) -> None:
    off, strong = (
        our_trace(
            pairs["sd1"],
            Case(
                sampler="ddim",
                safety=safety_from_preset(preset, calls=STEPS),
                steps=STEPS,
                seed=3,
                prompt="a red star",
            ),
        )
        for preset in ("off", "strong")
    )
    latents, pixels = disagreement(strong, off)
    assert latents > 100 * LATENTS
    assert pixels > 5 * PIXELS
