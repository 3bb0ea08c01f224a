"""The fallback through torch.onnx.export, on a UNet that the builder does not know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from oracles.families import save_model
from oracles.models import UnetKind, save_diffusers_directory
from oracles.tokenizers import VOCAB_SIZE, save_tokenizer
from sld_edge.engines.errors import CheckpointError
from sld_edge.engines.onnxruntime.engine import OrtEngine
from sld_edge.export import ExportSettings, checkpoint_from_source, export_bundle
from sld_edge.export.graphs.builder import GraphOptions
from sld_edge.export.graphs.unet import write_unet
from sld_edge.runtime.bundle import Bundle

pytest.importorskip("onnxscript", reason="torch.onnx.export needs it")
from sld_edge.export.via_torch import graph_modules, run_module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoint") / "odd"
    save_diffusers_directory(root, "sd1", vocab_size=VOCAB_SIZE)
    save_tokenizer(root / "tokenizer")
    config = root / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "act_fn": "gelu"}))
    return root


@pytest.fixture(scope="module")
def exported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    output = tmp_path_factory.mktemp("bundles") / "odd"
    return Bundle.open(
        export_bundle(
            ExportSettings(
                model=str(folder),
                output=output,
                precision="fp32",
                via="torch",
                verify=True,
                safety_concept="a cat",
            )
        )
    )


def test_the_builder_refuses_it_and_names_the_way_out(folder: Path, tmp_path: Path) -> None:
    unet = checkpoint_from_source(str(folder)).models["unet"]
    with pytest.raises(CheckpointError, match=r"act_fn .* --via torch"):
        write_unet(unet.config, unet.weights, GraphOptions(), tmp_path / "unet.onnx")


def test_the_interface_is_the_builders(exported: Bundle) -> None:
    parts = exported.manifest.components
    shapes = {
        name: {spec.name: spec.shape for spec in (*part.inputs, *part.outputs)}
        for name, part in parts.items()
    }
    assert shapes["unet"] == {
        "latents": ("B", 4, "h", "w"),
        "timestep": ("B",),
        "context": ("K*B", 77, 24),
        "noise_pred": ("K*B", 4, "h", "w"),
    }
    assert shapes["text_encoder"] == {"input_ids": ("N", 77), "hidden_states": ("N", 77, 24)}
    assert shapes["vae_decoder"]["images"] == ("B", "H", "W", 3)
    assert shapes["vae_decoder"]["finite"] == ("B",)
    assert (parts["unet"].opset, parts["unet"].attention) == (23, "op")


@pytest.mark.parametrize("branches", [1, 2, 3])
@pytest.mark.parametrize(("images", "h", "w"), [(1, 8, 8), (2, 16, 24), (3, 24, 8)])
def test_unet_at_other_sizes(
    branches: int, images: int, h: int, w: int, exported: Bundle, folder: Path
) -> None:
    module = graph_modules(checkpoint_from_source(str(folder)), precision="fp32")["unet"]
    rng = np.random.default_rng(branches)
    feeds = {
        "latents": rng.standard_normal((images, 4, h, w), np.float32),
        "timestep": np.linspace(1, 900, images, dtype=np.float32),
        "context": rng.standard_normal((branches * images, 77, 24), np.float32),
    }
    with OrtEngine(exported.path / "unet.onnx") as engine:
        got = engine.run(feeds)["noise_pred"]
    want = run_module(module, list(feeds.values()))
    assert got.shape == (branches * images, 4, h, w)
    # Two implementations of the same FP32 sums.
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_nothing_of_this_machine_is_in_it(exported: Bundle) -> None:
    for file in exported.path.glob("*.onnx"):
        raw = file.read_bytes()
        for secret in (b"site-packages", b".py", str(Path.home()).encode() + b"/", b"/tmp/"):
            assert secret not in raw, (file.name, secret)


@pytest.mark.parametrize("how", [{"via": "torch"}, {"verify": True}])
@pytest.mark.parametrize(
    ("kind", "named"),
    [("lcm", "time_cond_proj_dim"), ("sdxl", "addition_embed_type of the UNet, text_encoder_2")],
)
def test_more_than_plain_models_are_refused(
    kind: UnetKind, named: str, how: dict[str, Any], tmp_path: Path
) -> None:
    source = save_model(tmp_path / "model", kind)
    settings = ExportSettings(model=str(source), output=tmp_path / "out", **how)
    with pytest.raises(CheckpointError, match=f"would drop an input or a model .*{named}"):
        export_bundle(settings)
    assert not (tmp_path / "out").exists()
