"""The pipeline on the embedded miniature model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from oracles.requests import flat_request
from sld_edge.engines.base import Array, Engine
from sld_edge.runtime import InputError, NumericsError, Pipeline, Safety, Step
from sld_edge.runtime.tokenizer import Tokenizer, input_ids

FAST: dict[str, Any] = {"steps": 4, "sampler": "ddim"}


def test_image_k_of_seed_s_is_the_image_of_seed_s_plus_k(miniature: Pipeline) -> None:
    together = miniature("a red star at a party", seed=5, count=3, **FAST)
    alone = [miniature("a red star at a party", seed=5 + k, **FAST) for k in range(3)]
    for k in range(3):
        assert together.images[k].tobytes() == alone[k].images[0].tobytes(), f"image {k}"
        assert together.reports[k]["seed"] == 5 + k


def test_a_mixed_batch_gives_each_image_as_if_it_were_alone(miniature: Pipeline) -> None:
    prompts = ["a red star at a party", "a skull", "a blue heart in the snow"]
    own: dict[str, Any] = {
        "safety": ["off", "max", Safety(scale=300, warmup_steps=1, momentum_scale=0)],
        "guidance_scale": [7.5, 1.0, 3.0],
        "negative_prompt": ["", "", "a star"],
        "seed": [3, 1, 4],
    }
    together = miniature(prompts, batch_size=3, **own, **FAST)
    for k, prompt in enumerate(prompts):
        alone = miniature(prompt, **{name: value[k] for name, value in own.items()}, **FAST)
        difference = np.abs(together.latents[k] - alone.latents[0]).max()
        # Another batch rounds otherwise, and max turns that into a mask 5000 times as steep.
        assert difference < 5e-3, f"image {k} differs by {difference}"


def test_stochastic_samplers_draw_each_image_its_own_noise(miniature: Pipeline) -> None:
    together = miniature("a star", seed=8, count=2, batch_size=2, steps=4, sampler="euler-a")
    alone = miniature("a star", seed=9, steps=4, sampler="euler-a")
    assert np.abs(together.latents[1] - alone.latents[0]).max() < 5e-3  # rounding of a batch
    assert np.abs(together.latents[0] - alone.latents[0]).max() > 0.1


def branches(pipeline: Pipeline, **settings: Any) -> list[int]:
    seen: list[Step] = []
    pipeline("a star", callback=seen.append, **{**FAST, **settings})
    return [step.branches for step in seen]


def test_only_the_branches_that_matter_are_computed(miniature: Pipeline) -> None:
    assert branches(miniature, safety="off") == [2] * 4
    assert branches(miniature, safety="off", guidance_scale=1) == [1] * 4
    assert branches(miniature, safety="weak", steps=10) == [2] * 3 + [3] * 7
    assert branches(miniature, safety="medium") == [3] * 4  # momentum builds up in the warm-up
    assert branches(miniature, safety="strong", guidance_scale=0.5) == [3] * 4
    assert branches(miniature, safety=Safety(scale=0)) == [2] * 4


def test_skipping_the_branch_of_weak_is_exact(
    miniature: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"safety": "weak", "steps": 10, "sampler": "ddim", "seed": 2}
    skipped = miniature("a red star at a party", **settings)
    monkeypatch.setattr("sld_edge.runtime.denoise.loop.Job.branches", lambda *_: 3)
    whole = miniature("a red star at a party", **settings)
    assert np.abs(skipped.latents - whole.latents).max() < 1e-4


def test_safety_acts_at_guidance_scale_one(miniature: Pipeline) -> None:
    plain, safe = (
        miniature("a skull", guidance_scale=1, safety=preset, seed=1, **FAST)
        for preset in ("off", "max")
    )
    assert np.abs(plain.latents - safe.latents).max() > 0.05
    assert safe.reports[0]["safety"]["acted"]
    assert not plain.reports[0]["safety"]["acted"]


def test_branches_one_after_another_give_the_same(
    miniature: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = miniature("a red star", safety="strong", **FAST)
    monkeypatch.setattr("sld_edge.runtime.executor.CELLS", 1)
    apart = miniature("a red star", safety="strong", **FAST)
    assert np.abs(together.latents - apart.latents).max() < 1e-3  # rounding of a batch


def test_the_generator_can_be_watched_stopped_and_decoded(miniature: Pipeline) -> None:
    plan = miniature.resolve(flat_request(prompts=("a star",), steps=6, sampler="ddim"))
    steps = miniature.steps(plan)
    first = next(steps)
    steps.close()
    assert (first.index, first.calls) == (0, 6)
    assert miniature.decode(first.latents).shape == (1, 64, 64, 3)
    with pytest.raises(StopIteration):
        next(steps)


def test_a_callback_that_raises_ends_the_run(miniature: Pipeline) -> None:
    def stop(step: Step) -> None:
        if step.index == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        miniature("a star", callback=stop, **FAST)


def test_given_latents_take_the_place_of_the_seed(miniature: Pipeline) -> None:
    from sld_edge.runtime.random import noise_source

    start = noise_source("torch", 9).normal((1, 4, 16, 16))
    given = miniature("a star", latents=start, **FAST)
    seeded = miniature("a star", seed=9, **FAST)
    assert given.images[0].tobytes() == seeded.images[0].tobytes()


@pytest.mark.parametrize(
    ("latents", "says"),
    [
        (np.full((1, 4, 16, 16), np.nan, np.float32), "NaN"),
        (np.zeros((1, 4, 16, 15), np.float32), "latents"),
        (np.zeros((2, 4, 16, 16), np.float32), "latents"),
        (np.zeros((1, 4, 16, 16), np.float64), "float32"),
    ],
)
def test_latents_that_do_not_fit_are_refused(
    miniature: Pipeline, latents: Array, says: str
) -> None:
    with pytest.raises(InputError, match=says):
        miniature("a star", latents=latents, **FAST)


def test_another_size_than_the_trained_one(miniature: Pipeline) -> None:
    assert miniature("a star", width=96, height=52, **FAST).images[0].size == (96, 52)


def test_texts_are_encoded_once_and_constant_ones_never(miniature: Pipeline) -> None:
    pipeline = Pipeline.load(miniature.bundle.path, provider="cpu")
    concept = pipeline.bundle.manifest.safety_concept
    pipeline.encode_text(""), pipeline.encode_text(concept)
    assert "text_encoder" not in pipeline._executor.store.engines
    first = pipeline.encode_text("a star")
    assert pipeline.encode_text("a star") is first


def test_stored_embeddings_are_what_the_text_encoder_gives(miniature: Pipeline) -> None:
    fresh = Pipeline.load(miniature.bundle.path, provider="cpu")
    tokenizer = Tokenizer(fresh.bundle.tokenizer_json("text_encoder"), length=24)
    for text, stored in fresh.bundle.embeddings().items():
        feeds = {"input_ids": input_ids([tokenizer(text)])}
        got = fresh.engine("text_encoder").run(feeds)["hidden_states"][0]
        assert np.abs(got - stored["context"]).max() < 1e-5, repr(text)


def test_safety_acts_where_the_map_says(miniature: Pipeline) -> None:
    result = miniature("a skull", safety="max", seed=3, **FAST)
    assert result.edit_maps.shape == (1, 16, 16)
    assert result.edit_maps.max() > 0
    assert miniature("a skull", safety="off", seed=3, **FAST).edit_maps.max() == 0


def test_a_report_is_complete(miniature: Pipeline) -> None:
    result = miniature("a red star " + "at a party " * 12, safety="strong", count=2, **FAST)
    report = result.reports[1]
    assert report["cut_from_prompts"]["prompt"].endswith("a party")
    assert report["bundle_sha256"] == miniature.bundle.sha256
    assert [call["timestep"] for call in report["calls"]] == sorted(
        (call["timestep"] for call in report["calls"]), reverse=True
    )
    assert all(0 <= call["share"] <= 1 for call in report["calls"])
    assert sum(report["seconds"][name] for name in ("text", "denoise", "decode")) > 0
    assert report["safety"]["preset"] == "strong"
    assert {"python", "numpy"} <= set(report["versions"])


def test_what_the_graph_calls_not_finite_stops_the_run(
    miniature: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    guidance = miniature.engine("guidance")
    run = guidance.run

    def overflow(feeds: dict[str, Array]) -> dict[str, Array]:
        return run({**feeds, "row": feeds["row"] * np.float32(3e38)})

    monkeypatch.setattr(guidance, "run", overflow)
    with pytest.raises(NumericsError, match="guidance: NaN or infinity at call 1 of 4"):
        miniature("a star", **FAST)


def test_engines_are_loaded_once(miniature: Pipeline) -> None:
    engine: Engine = miniature.engine("unet")
    assert miniature.engine("unet") is engine
