"""The provider openvino in a pipeline: ONNX Runtime's pictures, and what it says of itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sld_edge.engines.errors import InputError
from sld_edge.engines.openvino.engine import OpenVinoEngine
from sld_edge.runtime import Pipeline
from sld_edge.runtime.selftest.tolerances import BOUNDS, tolerance

pytest.importorskip("openvino")

PROMPTS = ["a red star at a party", "a blue heart in an alley"]
# tests/same_pictures.py has the whole product of samplers and presets; each is here once.
CASES: list[dict[str, Any]] = [
    {"sampler": "ddim", "safety": "guard"},
    {"sampler": "pndm", "safety": "max"},
    {"sampler": "euler", "safety": "weak"},
    {"sampler": "euler-a", "safety": "strong"},
    {"sampler": "dpm++2m", "safety": "off"},
    {"sampler": "dpm++2m-karras", "safety": "medium"},
    {"sampler": "lcm", "safety": "guard-max"},
    {"sampler": "unipc", "safety": "early"},
    {"sampler": "lms", "safety": "guard-lite"},
    {"count": 3, "batch_size": 3},
    {"width": 96, "height": 48, "safety": ["weak", "max"], "guidance_scale": [1.0, 7.5]},
    {"safety_concept": ("a skull", "the colour red", "snow")},
    {"cache_interval": 2},
]


@pytest.fixture(scope="module")
def exact() -> Iterator[Pipeline]:
    with Pipeline.load(provider="cpu") as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def ours() -> Iterator[Pipeline]:
    with Pipeline.load(provider="openvino") as pipeline:
        yield pipeline


def levels(one: Pipeline, other: Pipeline, prompts: Any = None, **settings: Any) -> int:
    """Return the largest difference of two pipelines' pictures, of 255."""
    asked = {"steps": 6, "seed": 3, **settings}
    mine, theirs = (
        np.stack([np.asarray(x) for x in each(prompts or PROMPTS, **asked).images]).astype(int)
        for each in (one, other)
    )
    return int(np.abs(mine - theirs).max())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_pictures_are_onnxruntimes(ours: Pipeline, exact: Pipeline, case: Any) -> None:
    assert levels(ours, exact, **case) <= 1


def test_so_are_those_of_graphs_of_fixed_sizes(
    exact: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As large graphs are compiled: one branch at a time, again only for another size."""
    monkeypatch.setattr("sld_edge.runtime.loader._HEAVY_BYTES", 0)
    compiled: list[Any] = []
    compile_once = OpenVinoEngine._compile

    def counted(self: OpenVinoEngine, sizes: Any) -> None:
        compiled.append(sizes)
        compile_once(self, sizes)

    monkeypatch.setattr(OpenVinoEngine, "_compile", counted)
    with Pipeline.load(provider="openvino") as pipeline:
        pipeline.warm_up()
        assert len(compiled) == 1
        assert levels(pipeline, exact, safety="weak", seed=5) <= 1  # from 2 branches to 3
        assert levels(pipeline, exact, safety="guard", sampler="euler-a") <= 1  # from 3 to 2
        assert len(compiled) == 1
        assert levels(pipeline, exact, width=96, height=48, steps=2) <= 1
        assert [sizes["latents"] for sizes in compiled] == [(1, 4, 16, 16), (1, 4, 12, 24)]


def test_sdxl_too(tmp_path: Path) -> None:
    """Its UNet has more inputs, and its decoder is FP32."""
    families = pytest.importorskip("oracles.families")  # diffusers
    model = families.model_of(tmp_path, "sdxl")
    with Pipeline.load(model.ours.bundle.path, provider="openvino") as pipeline:
        assert levels(pipeline, model.ours, steps=3, safety="strong") <= 1


def test_guidance_and_texts_stay_with_onnxruntime_in_fp32(ours: Pipeline) -> None:
    assert ours.providers == {
        "text_encoder": "cpu",
        "unet": "openvino CPU fp32",
        "unet_shallow": "openvino CPU fp32",
        "vae_decoder": "cpu",
        "guidance": "cpu",
    }
    report = ours("a red star", steps=2).reports[0]
    assert report["provider"] == "openvino"
    assert report["components"] == dict(ours.providers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"provider": "cpu", "device": "GPU"},
            r"--device GPU needs OpenVINO \| got --provider cpu",
        ),
        ({"provider": "cpu", "cpu_precision": "bf16"}, "--cpu-precision bf16 needs OpenVINO"),
        ({"device": "TPU"}, "--device .* got TPU"),
        ({"provider": "openvino", "cpu_precision": "fp8"}, "--cpu-precision .* got fp8"),
    ],
)
def test_settings_that_contradict(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Pipeline.load(**settings)


def test_a_device_or_bf16_alone_mean_openvino() -> None:
    with Pipeline.load(device="AUTO") as pipeline:
        assert pipeline.provider == "openvino"


def test_bf16_is_the_unets_and_the_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sld_edge.engines.openvino.target.why_no_bf16", lambda: None)
    with Pipeline.load(cpu_precision="bf16") as pipeline:
        bf16 = "openvino CPU bf16"
        assert pipeline.providers == {
            "text_encoder": "cpu",
            "unet": bf16,
            "unet_shallow": bf16,
            "vae_decoder": bf16,
            "guidance": "cpu",
        }
        result = pipeline("a red star", steps=2)
    assert result.reports[0]["components"]["unet"] == bf16


def test_the_bounds_of_the_self_test_follow_the_arithmetic() -> None:
    assert tolerance("fp32", "openvino CPU fp32") == BOUNDS["cpu"]
    assert tolerance("fp16", "openvino CPU fp32") == BOUNDS["fp16"]
    assert tolerance("fp32", "openvino CPU bf16") == BOUNDS["bf16"]
    assert tolerance("fp32", "openvino GPU.0") == BOUNDS["fp16"]
