"""One pipeline, many threads: every picture is the one that its request makes alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import standin
from oracles.requests import flat_request
from sld_edge.runtime import InputError, Pipeline, Result, Step
from sld_edge.runtime.bundle import EMBEDDED
from standin.plans import VERSIONS, make_plans

REQUESTS: list[dict[str, Any]] = [
    {"prompt": "a red star at a party", "safety": preset, "seed": seed, "steps": steps}
    for seed, (preset, steps) in enumerate(
        (preset, steps) for preset in ("off", "weak", "medium", "strong", "max") for steps in (3, 5)
    )
] + [
    {"prompt": ["a heart", "a skull in an alley"], "safety": ["off", "max"], "steps": 4, "seed": 9},
    {"prompt": "a star", "safety": "max", "steps": 4, "safety_concept": ("snow", "a skull")},
    {"prompt": "a star", "sampler": "euler-a", "steps": 4, "seed": 4},
]


@pytest.fixture(params=["cpu", "tensorrt", "tensorrt-rtx"])
def shared(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Pipeline]:
    if request.param == "cpu":
        with Pipeline.load(provider="cpu") as pipeline:
            yield pipeline
        return
    standin.install(monkeypatch)
    bundle = Path(shutil.copytree(EMBEDDED, tmp_path / "mini"))
    flavour = request.param
    make_plans(
        bundle,
        engine=flavour,
        version=VERSIONS[flavour],
        compute_capabilities=("8.6",),
        concepts=2,
    )
    with Pipeline.load(bundle, provider=flavour) as pipeline:
        yield pipeline


def assert_same(got: Result, wanted: Result) -> None:
    np.testing.assert_array_equal(got.latents, wanted.latents)
    np.testing.assert_array_equal(got.edit_maps, wanted.edit_maps)
    assert [image.tobytes() for image in got.images] == [i.tobytes() for i in wanted.images]
    for ours, theirs in zip(got.reports, wanted.reports, strict=True):
        assert ours["safety"] == theirs["safety"]
        assert [c["strength"] for c in ours["calls"]] == [c["strength"] for c in theirs["calls"]]


def plan_of(pipeline: Pipeline, **settings: Any) -> Any:
    return pipeline.resolve(flat_request(prompts=("a red star",), steps=4, **settings))


def test_four_threads_mix_nothing(shared: Pipeline) -> None:
    alone = [shared(**asked) for asked in REQUESTS]
    previews = [[image.tobytes() for image in result.images] for result in alone]

    def made(asked: dict[str, Any]) -> tuple[Result, list[bytes]]:
        seen: list[bytes] = []

        def preview(step: Step) -> None:
            if step.index + 1 == step.calls:
                seen.extend(picture.tobytes() for picture in shared.decode(step.latents))

        if asked["steps"] == 3:  # and between the runs, one that is begun and left alone
            refused = [] if shared.provider == "cpu" else [InputError]  # another came between
            with suppress(*refused):
                next(shared.steps(plan_of(shared, safety="max", seed=77)))
        return shared(**asked, callback=preview), seen

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(made, REQUESTS * 3))
    for index, (result, seen) in enumerate(found):
        assert_same(result, alone[index % len(REQUESTS)])
        assert seen == previews[index % len(REQUESTS)]


def test_a_generator_that_is_left_alone_blocks_nobody(shared: Pipeline) -> None:
    wanted = shared("a heart", safety="strong", steps=4, seed=2)
    left = shared.steps(plan_of(shared, safety="max"))
    next(left)
    assert_same(shared("a heart", safety="strong", steps=4, seed=2), wanted)
    if shared.provider == "cpu":
        *_, last = left  # goes on exactly
        own = shared("a red star", safety="max", steps=4)
        np.testing.assert_array_equal(last.latents, own.latents)
    else:
        with pytest.raises(InputError, match="another run has begun"):
            next(left)


def test_steps_taken_in_turns_on_the_cpu(miniature: Pipeline) -> None:
    shared = miniature
    plans = [plan_of(shared, safety=preset, seed=5) for preset in ("off", "medium", "max")]
    alone = [shared.run(plan).latents for plan in plans]
    walks = [shared.steps(plan) for plan in plans]
    last = [next(walk) for _ in range(4) for walk in walks][-3:]
    for step, wanted in zip(last, alone, strict=True):
        np.testing.assert_array_equal(step.latents, wanted)


def test_a_step_that_is_past_gives_no_later_latents(shared: Pipeline) -> None:
    steps = shared.steps(plan_of(shared, safety="max"))
    first = next(steps)
    kept, figures = first.latents.copy(), first.figures
    second = next(steps)
    for name in ("latents", "edit_map"):
        with pytest.raises(InputError, match=r"of call 1 are gone: call 2 was made"):
            getattr(first, name)
    assert not np.array_equal(second.latents, kept)
    np.testing.assert_array_equal(first.figures.strength, figures.strength)
    assert len(second.figures.share) == 2


def test_a_whole_run_inside_a_callback(shared: Pipeline) -> None:
    wanted = shared("a heart", safety="strong", steps=4)
    inner: list[Result] = []

    def nested(step: Step) -> None:
        if step.index == 1:
            inner.append(shared("a heart", safety="strong", steps=4))

    if shared.provider == "cpu":
        outer = shared("a red star", safety="max", steps=4, callback=nested)
        assert_same(outer, shared("a red star", safety="max", steps=4))
    else:
        with pytest.raises(InputError, match="another run has begun"):
            shared("a red star", safety="max", steps=4, callback=nested)
    assert_same(inner[0], wanted)


def test_heavy_graphs_that_are_in_use_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sld_edge.runtime.loader._HEAVY_BYTES", 0)
    monkeypatch.setattr("sld_edge.runtime.executor.CELLS", 16 * 16)
    with Pipeline.load(provider="cpu") as pipeline:
        plan = plan_of(pipeline, safety="max", seed=5)
        wanted = pipeline.run(plan)
        walk = pipeline.steps(plan)
        next(walk)
        pipeline("a heart", steps=2)  # its end would free the UNet
        *_, last = walk
        np.testing.assert_array_equal(last.latents, wanted.latents)
        assert "unet" not in pipeline._executor.store.engines


def test_texts_that_were_used_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sld_edge.runtime.conditioning._CACHED_TEXTS", 2)
    with Pipeline.load(provider="cpu") as pipeline:
        kept = pipeline.encode_text("a star")
        pipeline.encode_text("a heart")
        assert pipeline.encode_text("a star") is kept
        pipeline.encode_text("a circle")  # a heart goes
        assert pipeline.encode_text("a star") is kept
        heart = pipeline.encode_text("a heart")
        assert pipeline.encode_text("a heart") is heart
