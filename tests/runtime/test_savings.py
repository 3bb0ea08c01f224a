"""Feature caching against the loop restated with plain ONNX Runtime sessions."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from oracles.guidance import guidance
from oracles.requests import flat_request
from sld_edge.engines.base import Array
from sld_edge.engines.errors import InputError
from sld_edge.runtime import Pipeline, Safety, Step
from sld_edge.runtime.bundle import EMBEDDED
from sld_edge.runtime.commands.run import main
from sld_edge.runtime.random import noise_source

PROMPT = "a red star at a party"
TWO = ("a skull", "the colour red")
FAST: dict[str, Any] = {"sampler": "ddim", "seed": 3}
GENTLE = Safety(scale=5, threshold=1, warmup_steps=2)  # a gate that does not magnify rounding
LATE = Safety(scale=5, threshold=1, warmup_steps=2, momentum_scale=0)  # two branches, then more
# Of eight calls, by hand: whole or cached, and safety run or not needed.
CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "cache": ({"cache_interval": 2}, "wcwcwcwc", "ssssssss"),
    "cache 3": ({"cache_interval": 3, "safety": LATE}, "wcwccwcc", "..ssssss"),
    "plain": ({"cache_interval": 3, "safety": "off"}, "wccwccwc", "........"),
    "one branch": (
        {"cache_interval": 3, "safety": "off", "guidance_scale": 1.0},
        "wccwccwc",
        "........",
    ),
    "two concepts": (
        {"cache_interval": 2, "safety_concept": TWO},
        "wcwcwcwc",
        "ssssssss",
    ),
}


@cache
def session(name: str) -> onnxruntime.InferenceSession:
    """A graph of the miniature as it lies there, in one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(EMBEDDED / f"{name}.onnx"), options)


def restated(pipeline: Pipeline, whole: str, safe: str, **settings: Any) -> Array:
    """The loop once more, in float64, a branch at a time; only the graphs and texts are ours."""
    plan = pipeline.resolve(flat_request(prompts=(PROMPT,), steps=8, **settings))
    (image,) = plan.images
    numbers = image.safety
    latents = noise_source("torch", image.seed).normal((1, 4, 16, 16)).astype(np.float64)
    state: dict[str, Array] = {
        "latents": latents * plan.table.init_noise_sigma,
        "momentum": np.zeros_like(latents),
        "history": np.zeros((4, *latents.shape)),
        "edit_map": np.zeros((1, 16, 16)),
    }
    unet_latents = state["latents"] * plan.table.c_in[0]
    deep: dict[str, Array] = {}
    kept: dict[str, Array] = {}
    for index in range(plan.table.calls):
        feeds = {
            "latents": unet_latents.astype(np.float32),
            "timestep": np.array([plan.table.timesteps[index]], np.float32),
        }
        texts = [PROMPT] if image.guidance_scale <= 1 else ["", PROMPT]
        if safe[index] == "s":
            texts += image.concepts
        for text in texts:
            own = {**feeds, "context": pipeline.encode_text(text)["context"][None]}
            if whole[index] == "w":
                predicted, deep[text] = session("unet").run(["noise_pred", "deep"], own)
            else:
                own["deep"] = deep[text]
                (predicted,) = session("unet_shallow").run(["noise_pred"], own)
            kept[text] = predicted.astype(np.float64)
        uncond = kept["" if "" in texts else PROMPT]
        if safe[index] == "s":
            direction = [kept[text] - uncond for text in image.concepts]
        acts = safe[index] != "."
        out = guidance(
            {
                "noise_pred_uncond": uncond,
                "noise_pred_text": kept[PROMPT],
                "noise_pred_safety": np.stack(
                    [uncond + away for away in direction] if acts else [uncond]
                ),
                **state,
                "noise": np.zeros_like(latents),
                "row": plan.table.rows()[index].astype(np.float64),
                "guidance_scale": np.array([image.guidance_scale]),
                "safety": np.array(
                    [
                        [
                            numbers.scale,
                            numbers.threshold,
                            numbers.momentum_scale,
                            numbers.momentum_beta,
                            float(acts and index >= numbers.warmup),
                        ]
                    ]
                ),
            }
        )
        state = {name: out[f"{name}_next"] for name in state}
        unet_latents = out["unet_latents"]
    return state["latents"]


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_is_the_loop_restated(
    miniature: Pipeline, case: str, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not together:
        monkeypatch.setattr("sld_edge.runtime.executor.CELLS", 0)
    changes, whole, safe = CASES[case]
    settings = {**FAST, "safety": GENTLE, **changes}
    seen: list[Step] = []
    got = miniature(PROMPT, steps=8, callback=seen.append, **settings)
    wanted = restated(miniature, whole, safe, **settings)
    assert np.abs(got.latents - wanted).max() < 2e-4
    assert "".join("c" if step.cached else "w" for step in seen) == whole
    exact = miniature(PROMPT, steps=8, **{**settings, "cache_interval": 1})
    assert np.abs(got.latents - exact.latents).max() > 0.02, "nothing was saved"


def test_off_is_exact(miniature: Pipeline) -> None:
    plain = miniature(PROMPT, steps=6, **FAST)
    off = miniature(PROMPT, steps=6, cache_interval=1, **FAST)
    assert plain.latents.tobytes() == off.latents.tobytes()
    assert not any(call["cached"] for call in off.reports[0]["calls"])


def test_a_batch_of_different_presets(miniature: Pipeline) -> None:
    own: dict[str, Any] = {"safety": ["off", GENTLE, GENTLE], "guidance_scale": [7.5, 3.0, 1.0]}
    savings: dict[str, Any] = {"cache_interval": 2}
    together = miniature([PROMPT] * 3, batch_size=3, steps=8, **own, **savings, **FAST)
    for k in range(3):
        alone = miniature(
            PROMPT, steps=8, **{name: value[k] for name, value in own.items()}, **savings, **FAST
        )
        difference = np.abs(together.latents[k] - alone.latents[0]).max()
        assert difference < 2e-3, f"image {k} differs by {difference}"


@pytest.mark.parametrize("value", [0, -1, 9, 1.5])
def test_intervals_that_make_no_sense(miniature: Pipeline, value: Any) -> None:
    says = f"cache interval .*got {value} .*a whole number from 1 to 8"
    with pytest.raises(InputError, match=says):
        miniature(PROMPT, steps=8, cache_interval=value)


def test_a_bundle_without_the_graphs(bundle_copy: Path) -> None:
    file = bundle_copy / "bundle.json"
    body = json.loads(file.read_text())
    del body["components"]["unet_shallow"]
    file.write_text(json.dumps(body))
    with Pipeline.load(bundle_copy, provider="cpu") as pipeline:
        with pytest.raises(InputError, match=r"no unet_shallow .* export it again"):
            pipeline(PROMPT, steps=8, cache_interval=7)
        pipeline(PROMPT, steps=2)


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [PROMPT, "--steps", "4", "--quiet", "--output", "a.png"]
    assert main([*given, "--cache-interval", "2"]) == 0
    with Image.open("a.png") as picture:
        told = json.loads(picture.info["sld-edge"])
    assert told["cache_interval"] == 2
    assert [call["cached"] for call in told["calls"]] == [False, True, False, True]
    for wrong in ("0", "5"):
        assert main([*given, "--force", "--cache-interval", wrong]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "cache interval" in error
