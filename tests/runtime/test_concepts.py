"""Several safety concepts at once: each with its own branch and gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oracles.guidance import guidance
from oracles.requests import flat_request
from sld_edge.engines.base import Array
from sld_edge.engines.errors import BundleError, InputError
from sld_edge.engines.onnxruntime.engine import OrtEngine
from sld_edge.runtime import Pipeline, Safety, Step
from sld_edge.runtime.commands.run import main
from sld_edge.runtime.manifest import Manifest
from sld_edge.runtime.manifest_file import manifest_from_json
from sld_edge.runtime.random import noise_source

TWO = ("a skull", "the colour red")
FAST: dict[str, Any] = {"steps": 5, "sampler": "ddim", "seed": 3}
PROMPT = "a red star at a party"


def restated(pipeline: Pipeline, **settings: Any) -> dict[str, Array]:
    """The loop once more, in float64, a branch at a time; only the UNet and texts are ours."""
    plan = pipeline.resolve(flat_request(prompts=(PROMPT,), **settings))
    (image,) = plan.images
    unet = OrtEngine(pipeline.bundle.path / "unet.onnx")
    safety = image.safety
    latents = noise_source("torch", image.seed).normal((1, 4, 16, 16)).astype(np.float64)
    latents *= plan.table.init_noise_sigma
    state: dict[str, Array] = {
        "latents": latents,
        "momentum": np.zeros_like(latents),
        "history": np.zeros((4, *latents.shape)),
        "edit_map": np.zeros((1, 16, 16)),
    }
    unet_latents = latents * plan.table.c_in[0]
    strengths = []
    for index in range(plan.table.calls):

        def predict(text: str, x: Array = unet_latents, at: int = index) -> Array:
            feeds = {
                "latents": x.astype(np.float32),
                "timestep": np.array([plan.table.timesteps[at]], np.float32),
                "context": pipeline.encode_text(text)["context"][None],
            }
            return unet.run(feeds)["noise_pred"].astype(np.float64)

        active = index >= safety.warmup
        numbers = (safety.scale, safety.threshold, safety.momentum_scale, safety.momentum_beta)
        out = guidance(
            {
                "noise_pred_uncond": predict(""),
                "noise_pred_text": predict(PROMPT),
                "noise_pred_safety": np.stack([predict(text) for text in image.concepts]),
                **state,
                "noise": np.zeros_like(latents),
                "row": plan.table.rows()[index].astype(np.float64),
                "guidance_scale": np.array([image.guidance_scale]),
                "safety": np.array([[*numbers, float(active)]]),
            }
        )
        state = {name: out[f"{name}_next"] for name in state}
        unet_latents = out["unet_latents"]
        strengths.append(out["concept_strength"])
    return {**state, "concept_strength": np.stack(strengths)}


@pytest.mark.parametrize("safety", ["medium", Safety(scale=5, threshold=1, warmup_steps=2)])
def test_is_the_method_restated(miniature: Pipeline, safety: str | Safety) -> None:
    result = miniature(PROMPT, safety=safety, safety_concept=TWO, **FAST)
    wanted = restated(miniature, safety=safety, safety_concept=TWO, **FAST)
    # Medium's steep gate makes rounding visible; the gentle one shows the formula.
    tolerance = 5e-3 if safety == "medium" else 1e-4
    assert np.abs(result.latents - wanted["latents"]).max() < tolerance
    told = np.array([call["concept_strength"] for call in result.reports[0]["calls"]])
    assert np.abs(told - wanted["concept_strength"][:, :, 0]).max() < tolerance
    assert (told.mean(axis=0) > 0.002).all()
    for one in TWO:  # and not what either concept does alone
        alone = miniature(PROMPT, safety=safety, safety_concept=one, **FAST)
        assert np.abs(result.latents - alone.latents).max() > 0.02


def test_every_concept_is_a_branch(miniature: Pipeline) -> None:
    seen: list[Step] = []
    concepts = (*TWO, "snow")
    miniature(PROMPT, safety="weak", safety_concept=concepts, callback=seen.append, steps=10)
    assert [step.branches for step in seen] == [2] * 3 + [5] * 7
    figures = seen[-1].figures
    assert figures.concept_strength.shape == (10, 3, 1)
    assert (figures.concept_strength[:3] == 0).all()
    assert (figures.concept_strength[4:] > 0).any()


def test_a_concept_given_twice_is_given_once(miniature: Pipeline) -> None:
    asked: dict[str, Any] = {"safety": "medium", **FAST}
    once = miniature(PROMPT, safety_concept="a skull", **asked)
    seen: list[Step] = []
    twice = miniature(PROMPT, safety_concept=("a skull", "a skull"), callback=seen.append, **asked)
    assert {step.branches for step in seen} == {3}
    np.testing.assert_array_equal(once.latents, twice.latents)


def test_a_batch_may_mix_numbers_of_concepts(miniature: Pipeline) -> None:
    own: dict[str, Any] = {
        "safety": ["medium", "off", "strong"],
        "safety_concept": [TWO, None, "a skull"],
    }
    together = miniature([PROMPT] * 3, batch_size=3, **own, **FAST)
    for k in range(3):
        alone = miniature(PROMPT, **{name: value[k] for name, value in own.items()}, **FAST)
        assert np.abs(together.latents[k] - alone.latents[0]).max() < 5e-3, f"image {k}"
        assert len(together.reports[k]["calls"][0]["concept_strength"]) == (2, 0, 1)[k]


def test_branches_one_after_another_give_the_same(
    miniature: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = miniature(PROMPT, safety_concept=TWO, **FAST)
    monkeypatch.setattr("sld_edge.runtime.executor.CELLS", 0)
    apart = miniature(PROMPT, safety_concept=TWO, **FAST)
    assert np.abs(together.latents - apart.latents).max() < 5e-3


def test_the_end_of_a_concept_that_is_not_read_is_told(miniature: Pipeline) -> None:
    long = " ".join(["skull"] * 40)
    cut = miniature(PROMPT, safety_concept=("x", long), **FAST).reports[0]["cut_from_prompts"]
    assert list(cut) == ["safety_concept_2"]
    cut = miniature(PROMPT, safety_concept=long, **FAST).reports[0]["cut_from_prompts"]
    assert list(cut) == ["safety_concept"]


def test_the_report_names_the_strongest(miniature: Pipeline) -> None:
    safety = miniature(PROMPT, safety_concept=TWO, **FAST).reports[0]["safety"]
    assert safety["concept"] == "a skull | the colour red"
    assert [entry["concept"] for entry in safety["concepts"]] == list(TWO)
    means = {entry["concept"]: entry["mean_strength"] for entry in safety["concepts"]}
    assert safety["strongest_concept"] == max(means, key=means.__getitem__)
    off = miniature(PROMPT, safety="off", **FAST).reports[0]
    assert (off["safety"]["concept"], off["safety"]["concepts"]) == (None, [])
    assert off["safety"]["strongest_concept"] is None
    assert off["calls"][0]["concept_strength"] == []


def test_a_tuple_is_several_concepts_and_a_list_one_each(miniature: Pipeline) -> None:
    def concepts(**settings: Any) -> list[tuple[str, ...]]:
        asked = flat_request(prompts=("a", "b"), **settings)
        return [image.concepts for image in miniature.resolve(asked).images]

    assert concepts(safety_concept=("x", "y")) == [("x", "y")] * 2
    assert concepts(safety_concept=["x", "y"]) == [("x",), ("y",)]
    assert concepts(safety_concept=[("x", "y"), "z"]) == [("x", "y"), ("z",)]
    assert concepts(safety=Safety(concept=("x", "y", "x"))) == [("x", "y")] * 2
    with pytest.raises(InputError, match=r"got a list of 3 texts .*give a tuple"):
        concepts(safety_concept=["x", "y", "z"])
    with pytest.raises(InputError, match=r"safety concept.*got int"):
        concepts(safety_concept=("x", 1))
    with pytest.raises(InputError, match=r"safety concepts.*got 0"):
        Safety(concept=())


def test_the_command_takes_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [PROMPT, "--steps", "2", "--report", "r.json", "--quiet", "--output", "a.png"]
    assert main([*given, "--safety-concept", TWO[0], "--safety-concept", TWO[1]]) == 0
    assert "a skull | the colour red" in Path("r.json").read_text()
    long = " ".join(["skull"] * 40)
    assert main([PROMPT, "--steps", "1", "--safety-concept", "x", "--safety-concept", long]) == 0
    assert "does not read the end of the safety concept: “skull" in capsys.readouterr().err


def test_a_bundle_may_have_several(miniature: Pipeline) -> None:
    manifest: Manifest = miniature.bundle.manifest
    text = manifest.to_json()
    one = f'"safety_concepts": [\n  "{manifest.safety_concepts[0]}"\n ]'
    assert one in text
    two = manifest_from_json(
        text.replace(one, '"safety_concepts": ["x", "y"]').encode(), origin="b"
    )
    assert two.safety_concepts == ("x", "y")
    assert two.safety_concept == "x, y"
    for wrong in ("[]", '"x"'):
        with pytest.raises(BundleError, match="list of safety concepts"):
            manifest_from_json(
                text.replace(one, f'"safety_concepts": {wrong}').encode(), origin="b"
            )
