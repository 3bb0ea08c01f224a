"""Safety's numbers mean the same on every kind of output: twins of one model agree.

A twin is the same denoiser written for another output. Its UNet is the first one's, and its engine
turns the predicted noise into v or the clean latents.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sld_edge.engines.base import Array, Engine, TensorSpec
from sld_edge.runtime import InputError, Pipeline, Safety
from sld_edge.runtime.samplers import sampler_table

PROMPT = "a skull in an alley"
GENTLE = Safety(scale=5, threshold=0.5, warmup_steps=1, momentum_scale=0.5, momentum_beta=0.7)
SAMPLERS = ("ddim", "euler", "dpm++2m", "unipc", "lms", "euler-a")
KINDS = ("v_prediction", "sample")


class Twin:
    """The UNet's noise, written as another output; float64, so that only the loop rounds."""

    def __init__(self, engine: Engine, kind: str, alpha: Mapping[float, float]) -> None:
        self._engine, self._kind, self._alpha = engine, kind, alpha
        self.inputs: tuple[TensorSpec, ...] = engine.inputs
        self.outputs: tuple[TensorSpec, ...] = engine.outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        out = self._engine.run(feeds)
        noise = out["noise_pred"].astype(np.float64)
        alpha = self._alpha[float(feeds["timestep"][0])]
        sigma = np.sqrt(1 - alpha**2)
        branches = len(noise) // len(feeds["latents"])
        clean = (np.tile(feeds["latents"], (branches, 1, 1, 1)) - sigma * noise) / alpha
        other = clean if self._kind == "sample" else alpha * noise - sigma * clean
        return {**out, "noise_pred": other.astype(np.float32)}

    def close(self) -> None: ...

    def __enter__(self) -> Twin:
        return self

    def __exit__(self, *exc: object) -> None: ...


def twin_of(miniature: Pipeline, kind: str, sampler: str, steps: int, folder: Path) -> Pipeline:
    """Return a pipeline of the miniature that predicts something else."""
    import shutil

    bundle = Path(shutil.copytree(miniature.bundle.path, folder / kind))
    body = json.loads((bundle / "bundle.json").read_text())
    body["prediction_type"] = body["scheduler"]["prediction_type"] = kind
    (bundle / "bundle.json").write_text(json.dumps(body))
    table = sampler_table(sampler, body["scheduler"], steps)
    pipeline = Pipeline.load(bundle, provider="cpu")
    alpha = dict(zip(table.timesteps.astype(np.float32).tolist(), table.alpha, strict=True))
    pipeline._executor.store.engines["unet"] = Twin(miniature.engine("unet"), kind, alpha)
    return pipeline


def distance(got: Array, wanted: Array) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_twin_makes_the_same_picture(
    miniature: Pipeline, kind: str, sampler: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"steps": 8, "sampler": sampler, "seed": 3, "safety": GENTLE}
    noise = miniature(PROMPT, **settings)
    with twin_of(miniature, kind, sampler, 8, tmp_path) as twin:
        got = twin(PROMPT, **settings)
        raw = twin(PROMPT, safety_units="raw", **settings)
    assert distance(got.latents, noise.latents) < 5e-6  # FP32 outputs of the twin, 8 calls
    assert distance(raw.latents, noise.latents) > 1e-3, "raw units are others"
    ours, theirs = (
        [call["strength"] for call in result.reports[0]["calls"]] for result in (got, noise)
    )
    assert got.reports[0]["safety"]["units"] == "noise"
    assert raw.reports[0]["safety"]["units"] == "raw"
    assert [s > 0 for s in ours] == [s > 0 for s in theirs]


@pytest.mark.parametrize("value", ["", "RAW", "v", None, 3])
def test_units_that_are_none(miniature: Pipeline, value: Any) -> None:
    with pytest.raises(InputError, match=r"safety_units .* one of noise, raw"):
        miniature(PROMPT, steps=3, safety_units=value)


def test_epsilon_is_the_same_in_both(miniature: Pipeline) -> None:
    settings: dict[str, Any] = {"steps": 5, "sampler": "ddim", "seed": 3, "safety": "strong"}
    noise, raw = (miniature(PROMPT, safety_units=u, **settings) for u in ("noise", "raw"))
    assert noise.latents.tobytes() == raw.latents.tobytes()


def test_the_first_call_at_zero_snr_is_edited() -> None:
    scheduler = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "beta_schedule": "scaled_linear",
    }
    table = sampler_table("ddim", scheduler, 10)
    assert table.alpha[0] == 0
    assert table.rows()[0, -1] == np.float32(0.068)
    assert (table.rows()[:, -1] > 0).all()
    assert (sampler_table("ddim", scheduler, 10, safety_units="raw").rows()[:, -1] == 1).all()
