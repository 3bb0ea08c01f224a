"""On the CPU: heavy FP16 weights stay FP16, and heavy graphs are held only while they run."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from oracles.requests import flat_request
from sld_edge.engines.onnxruntime.engine import OrtEngine
from sld_edge.runtime import Pipeline, Step

FAST: dict[str, Any] = {"steps": 3, "sampler": "ddim", "safety": "strong"}
EVERY = {"text_encoder", "unet", "guidance", "vae_decoder"}


@pytest.fixture
def heavy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Count the miniature's components as heavy; for pipelines of a test's own only."""
    monkeypatch.setattr("sld_edge.runtime.loader._HEAVY_BYTES", 0)


def stored(engine: object) -> set[int]:
    """Types of the larger weights in an engine's file."""
    assert isinstance(engine, OrtEngine)
    graph = onnx.load(str(engine.path), load_external_data=False).graph
    return {tensor.data_type for tensor in graph.initializer if np.prod(tensor.dims) > 1024}


def test_fp16_weights_are_cast_once_where_light_and_stay_where_heavy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Pipeline.load(provider="cpu") as pipeline:
        assert stored(pipeline.engine("unet")) == {onnx.TensorProto.FLOAT}
        wanted = pipeline("a red star", **FAST)
    monkeypatch.setattr("sld_edge.runtime.loader._HEAVY_BYTES", 0)
    with Pipeline.load(provider="cpu") as pipeline:
        assert stored(pipeline.engine("unet")) == {onnx.TensorProto.FLOAT16}
        got = pipeline("a red star", **FAST)
    # The same weights and arithmetic; other kernels of convolution round otherwise.
    assert np.abs(got.latents - wanted.latents).max() < 1e-3


@pytest.mark.usefixtures("heavy")
def test_heavy_graphs_go_when_they_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    with Pipeline.load(provider="cpu") as pipeline:
        during: list[set[str]] = []
        decoding: list[set[str]] = []
        decode = pipeline._executor.decode

        def watched(latents: Any) -> Any:
            decoding.append(set(pipeline._executor.store.engines))
            return decode(latents)

        monkeypatch.setattr(pipeline._executor, "decode", watched)

        def look(_: Step) -> None:
            during.append(set(pipeline._executor.store.engines))

        first = pipeline("a red star", callback=look, **FAST)
        assert during == [{"unet", "guidance"}] * 3
        assert decoding == [{"unet", "guidance"}]  # small pictures are soon made: it stays
        monkeypatch.setattr("sld_edge.runtime.executor.CELLS", 16 * 16)
        again = pipeline("a red star", **FAST)
        assert decoding[1:] == [{"guidance"}]
        assert set(pipeline._executor.store.engines) == {"guidance"}
        pipeline("a red star", count=2, **FAST)  # and is loaded again
        assert len(decoding) == 4
        steps = pipeline.steps(pipeline.resolve(flat_request(prompts=("a red star",), **FAST)))
        held = ["unet" in pipeline._executor.store.engines for _ in steps]
        assert held == [True] * 3
        assert "unet" not in pipeline._executor.store.engines  # walked by hand it goes too
    assert np.abs(first.latents - again.latents).max() < 1e-3  # branches one after another


def test_light_graphs_are_kept() -> None:
    with Pipeline.load(provider="cpu") as pipeline:
        pipeline("a red star", **FAST)
        assert set(pipeline._executor.store.engines) == {
            "text_encoder",
            "unet",
            "guidance",
            "vae_decoder",
        }


def test_low_memory_drops_light_ones_too() -> None:
    with Pipeline.load(provider="cpu", low_memory=True) as pipeline:
        pipeline("a red star", **FAST)
        assert set(pipeline._executor.store.engines) == {"unet", "guidance"}


@pytest.mark.usefixtures("heavy")
def test_what_is_not_prepared_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLD_EDGE_CACHE", "off")  # loading again would take long
    with Pipeline.load(provider="cpu") as pipeline:
        pipeline("a red star", **FAST)
        assert set(pipeline._executor.store.engines) == {
            "text_encoder",
            "unet",
            "guidance",
            "vae_decoder",
        }


@pytest.mark.usefixtures("heavy")
def test_a_preview_in_the_loop_leaves_it_whole() -> None:
    with Pipeline.load(provider="cpu") as pipeline:
        seen = []
        pipeline(
            "a red star", callback=lambda step: seen.append(pipeline.decode(step.latents)), **FAST
        )
        assert len(seen) == 3
