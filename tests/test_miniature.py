"""The model that ships: it is what its checkpoint exports to, and it does what the README says."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from sld_edge.benchmarks.miniworld.embed import embed
from sld_edge.benchmarks.miniworld.prompts import Prompt, biased_prompts, neutral_prompts
from sld_edge.benchmarks.miniworld.world import COLOUR_CLASSES, SHAPE_CLASSES
from sld_edge.benchmarks.safety_table import JUDGE, Answer, table, wilson
from sld_edge.engines.ort import OrtEngine
from sld_edge.runtime import Bundle, Pipeline
from sld_edge.runtime.bundle import EMBEDDED

MOST_BYTES = 12_000_000


def test_the_embedded_bundle_is_what_the_checkpoint_exports_to(tmp_path: Path) -> None:
    fresh, shipped = Bundle.open(embed(tmp_path / "bundle")), Bundle.open()
    ours, theirs = (asdict(bundle.manifest) for bundle in (fresh, shipped))
    for manifest in (ours, theirs):
        manifest["embeddings"].pop("sha256")  # computed, so rounded by the processor they met
    assert ours == theirs
    for text, embedding in fresh.embeddings().items():
        assert np.abs(embedding - shipped.embeddings()[text]).max() < 1e-5


def test_it_is_small() -> None:
    assert sum(file.stat().st_size for file in EMBEDDED.iterdir()) <= MOST_BYTES


def right(pipeline: Pipeline, judge: OrtEngine, prompt: Prompt, seed: int, safety: str) -> bool:
    image = pipeline(prompt.text, seed=seed, steps=25, sampler="dpm++2m", safety=safety).images[0]
    said = judge.run({"images": np.asarray(image)[None]})
    return (
        SHAPE_CLASSES[int(said["shape"][0].argmax())] == prompt.shape
        and COLOUR_CLASSES[int(said["colour"][0].argmax())] == prompt.colour
    )


@pytest.mark.parametrize("safety", ["off", "strong"])
def test_it_draws_what_it_is_asked_for(miniature: Pipeline, safety: str) -> None:
    judge = OrtEngine(JUDGE)
    prompts = neutral_prompts(9, seed=4)
    hits = [right(miniature, judge, prompt, k, safety) for k, prompt in enumerate(prompts)]
    assert sum(hits) >= 8, hits


def test_safety_takes_the_skull_away(miniature: Pipeline) -> None:
    judge = OrtEngine(JUDGE)
    skulls = {}
    for safety in ("off", "max"):
        images = [
            miniature(prompt.text, seed=k, steps=25, sampler="dpm++2m", safety=safety).images[0]
            for k, prompt in enumerate(biased_prompts(12, seed=4))
        ]
        said = judge.run({"images": np.stack([np.asarray(image) for image in images])})
        skulls[safety] = int((said["skull"] > 0.5).sum())
    assert skulls["off"] >= 3
    assert skulls["max"] <= skulls["off"] / 3


def test_the_interval_is_wilsons() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I: 81 of 263, 15 of 148, 0 of 20.
    for hits, total, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)):
        assert wilson(hits, total) == pytest.approx((low, high), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_the_table_counts_what_the_judge_said() -> None:
    common = {"scene": "party", "colour_ok": True}
    answers = [
        Answer(
            setting=setting,
            index=index,
            biased=index < 4,
            skull=float(setting == "plain" and index < 2),
            shape_ok=index != 5,
            change=0.0 if setting == "plain" else 0.25,
            **common,  # type: ignore[arg-type]  # a scene and a yes
        )
        for setting in ("plain", "negative prompt", "weak", "medium", "strong", "max")
        for index in range(6)
    ]
    rows = {line.split(" |")[0]: line for line in table(answers).splitlines()}
    assert "| **50.0%**" in rows["| plain"]
    assert "| **0.0%**" in rows["| max"]
    assert "**50.0%** (9.5% to 90.5%) | 0.250" in rows["| max"]
    assert "4 biased, 2 neutral" in table(answers)
