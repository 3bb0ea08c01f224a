"""The miniature's twin of few steps, and `sld-bench --few-steps`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel

from sld_edge.benchmarks.bench import few_steps as measurement
from sld_edge.benchmarks.bench.cli import main
from sld_edge.benchmarks.miniworld import few_steps
from sld_edge.benchmarks.miniworld.suites import suite_entries
from sld_edge.benchmarks.miniworld.training import train_few_steps
from sld_edge.engines.errors import OutputError
from sld_edge.runtime import Pipeline
from sld_edge.runtime.scorers import score_pictures, scorers_from_names

STEPS, SCALE = 4, 7.5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("twin") / "checkpoint"
    few_steps.write_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("results") / "models"
    measurement._twin(folder)
    return folder


def test_a_change_of_weights_is_kept_within_its_rounding(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    source = few_steps._source()
    name = "conv_in.weight"
    change = rng.normal(0, 0.02, source[name].shape).astype(np.float32)
    weights = {
        name: source[name].astype(np.float32) + change,
        "conv_in.bias": source["conv_in.bias"].astype(np.float32) + 0.25,
        "new.weight": rng.normal(0, 1, (3, 4)).astype(np.float32),
    }
    few_steps.write_change(tmp_path / "change", weights)
    kept = few_steps.weights_from_change(tmp_path / "change")
    assert set(kept) == set(weights)
    half = np.abs(change).reshape(len(change), -1).max(axis=1) / 127 / 2 + 1e-3
    apart = np.abs(kept[name].astype(np.float32) - weights[name]).reshape(len(change), -1)
    assert (apart <= half[:, None]).all()
    np.testing.assert_allclose(kept["conv_in.bias"], weights["conv_in.bias"], atol=2e-3)
    np.testing.assert_allclose(kept["new.weight"], weights["new.weight"], atol=2e-3)


def test_it_is_diffusers_lcm(checkpoint: Path, models: Path) -> None:
    oracle: Any = LatentConsistencyModelPipeline.from_pretrained(
        checkpoint, torch_dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    oracle.set_progress_bar_config(disable=True)
    assert oracle.unet.config.time_cond_proj_dim == few_steps.CONDITION_WIDTH
    prompt = "a red star in an alley"
    wanted = oracle(
        prompt,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        original_inference_steps=few_steps.SCHEDULER["original_inference_steps"],
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
        height=64,
        width=64,
    ).images.numpy()
    with Pipeline.load(models / "few-steps", provider="cpu") as pipeline:
        got = pipeline(prompt, safety="off", seed=3, steps=STEPS, guidance_scale=SCALE).latents
    assert np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < 1e-4


def test_its_pictures_show_what_the_prompt_names(models: Path) -> None:
    """In four steps; docs/benchmark.md has the shares of more pictures."""
    entries = suite_entries("neutral")[:24]
    texts = [entry.text for entry in entries]
    with Pipeline.load(models / "few-steps", provider="cpu") as pipeline:
        images = pipeline(texts, safety="off", seed=list(range(24)), steps=STEPS).images
    pixels = np.stack([np.asarray(image) for image in images])
    scores = score_pictures(scorers_from_names(["miniworld-examiner"]), pixels, texts)
    shown = [one["miniworld-examiner.adherence"] for one in scores]
    assert np.mean(shown) >= 0.9


def test_an_installation_without_the_weights_says_so(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="not in this installation.*clone of the repository"):
        few_steps.write_checkpoint(tmp_path / "twin", tmp_path / "nowhere")
    assert not (tmp_path / "twin").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pictures", "0"], "--pictures | got 0 | expected 1 to 400"),
        (["--pictures", "401"], "--pictures | got 401"),
        (["sd15"], "--few-steps | got sd15 too"),
        (["--peers"], "--few-steps | got --peers too"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["--few-steps", "--output", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_the_report_has_every_setting_that_a_model_takes(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurement, "FULL_STEPS", 3)
    monkeypatch.setattr(measurement, "FEW_STEPS", (1,))
    monkeypatch.setattr(measurement, "SAFETY", ("off", "negative", "max", "guard-lite"))
    folder = models.parent
    words = ["--few-steps", "--pictures", "2", "--quiet", "--output", str(folder)]
    assert main(words) == 0
    found = json.loads((folder / "results.json").read_text())
    rows = {(one["variant"], one["setting"]): one for one in found["figures"]}
    full = [("DDIM, 3 steps", name) for name in ("plain", "negative prompt", "max", "guard-lite")]
    assert list(rows) == [*full, ("twin, 1 step", "plain"), ("twin, 1 step", "max")]
    assert [rows[key]["branches"] for key in full] == [6, 6, 9, 6]
    assert rows["twin, 1 step", "plain"]["branches"] == 1
    assert rows["twin, 1 step", "max"]["branches"] == 3
    one = rows["twin, 1 step", "max"]
    assert one["ratio"] == one["seconds"] / rows["DDIM, 3 steps", "max"]["seconds"]
    assert [note.split(":")[0] for note in found["notes"] if "measured" in note] == [
        "not measured, negative prompt",
        "not measured, guard-lite",
    ]
    assert (folder / "report.md").read_text().count("## twin, 1 step") == 1


def test_the_training_runs(tmp_path: Path) -> None:
    """One step of each stage; the change that it writes makes a whole checkpoint."""
    settings = train_few_steps.Settings(pictures=50, trajectories=2, together=2, steps=1)
    train_few_steps.train(tmp_path, settings)
    few_steps.write_checkpoint(tmp_path / "model", tmp_path / few_steps.CHANGE.name)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "model" / "unet")
    assert unet.config.time_cond_proj_dim == few_steps.CONDITION_WIDTH
