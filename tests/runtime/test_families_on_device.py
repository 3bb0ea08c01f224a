"""Other families with TensorRT plans: bit for bit the CPU's on the stand-in; real plans build."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import standin
from oracles.families import save_model
from oracles.models import UnetKind
from sld_edge.engines.tensorrt.build_settings import BuildSettings
from sld_edge.export import ExportSettings, export_bundle
from sld_edge.export.build_plans import build_plans
from sld_edge.runtime import Framing, Pipeline
from standin.plans import make_plans

PROMPTS = ["a red star at a party", "a blue heart"]
CASES: tuple[dict[str, Any], ...] = (
    {"safety": "medium"},
    {"safety": "weak", "steps": 7, "negative_prompt": "a blue square"},  # two branches, then three
    {"safety": "off", "guidance_scale": 1.0},
    {"safety": "max", "safety_concept": ("a skull", "death"), "cache_interval": 2},
    {"safety": "strong", "framing": Framing(original_size=(512, 256), crop=(8, 16))},
)


@pytest.fixture(scope="module", params=["sdxl", "lcm", "lcm-sdxl", "no-middle"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kind: UnetKind = request.param
    root = tmp_path_factory.mktemp(kind)
    settings = ExportSettings(
        model=str(save_model(root / "model", kind)), output=root / "bundle", precision="fp32"
    )
    return export_bundle(settings)


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_the_device_makes_what_the_cpu_makes(
    bundle: Path, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    standin.install(monkeypatch)
    planned = Path(shutil.copytree(bundle, tmp_path / "planned"))
    make_plans(planned, engine="tensorrt", concepts=2)
    given = {"steps": 4, "seed": 3, "batch_size": 2, **settings}
    with (
        Pipeline.load(bundle, provider="cpu") as cpu,
        Pipeline.load(planned, provider="tensorrt") as device,
    ):
        assert set(device.providers.values()) == {"tensorrt"}
        if cpu.bundle.manifest.guidance == "embedded":
            given.pop("negative_prompt", None)  # it is refused
        wanted, got = cpu(PROMPTS, **given), device(PROMPTS, **given)
    np.testing.assert_array_equal(got.latents, wanted.latents)
    np.testing.assert_array_equal(got.edit_maps, wanted.edit_maps)
    for image, right in zip(got.images, wanted.images, strict=True):
        assert image.tobytes() == right.tobytes()


def test_real_plans_of_a_little_sdxl(tmp_path: Path) -> None:
    settings = ExportSettings(
        model=str(save_model(tmp_path / "model", "sdxl")),
        output=tmp_path / "bundle",
        attention="decomposed",
    )
    path = export_bundle(settings)
    infos = build_plans(path, BuildSettings(engine="tensorrt-rtx", compute_capabilities=("8.9",)))
    profiles = {
        tensor.spec.name: tensor.profile
        for info in infos
        for tensor in info.inputs
        if info.component == "unet"
    }
    assert [info.component for info in infos] == list(
        Pipeline.load(path, provider="cpu").bundle.manifest.components
    )
    assert profiles["pooled"] is not None
    assert profiles["pooled"][0][1:] == (20,)
    assert profiles["time_ids"] is not None
    assert profiles["time_ids"][2][1:] == (6,)
