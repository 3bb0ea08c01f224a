from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from oracles.models import config_of, tiny_decoder_vae, tiny_vae, weights_of
from oracles.running import outputs_of, relative_error
from sld_edge.engines.errors import CheckpointError
from sld_edge.export.checkpoints.weights import Weights
from sld_edge.export.graphs.builder import GraphBuilder, GraphOptions
from sld_edge.export.graphs.vae import write_tiny_decoder, write_vae_decoder

Array = np.ndarray[Any, Any]

TOLERANCES = {"fp32": 2e-6, "fp16": 3e-3}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def latents() -> Array:
    return np.random.default_rng(0).standard_normal((2, 4, 5, 6), np.float32)


def decoded(model: Any, latents: Array) -> Array:
    """diffusers' picture before it is made of bytes, [B,H,W,3] in 0..255."""
    config = model.config
    shift = config.shift_factor if config.shift_factor is not None else 0
    z = torch.from_numpy(latents) / config.scaling_factor + shift
    pictures = (model.decode(z).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    return np.asarray(pictures * 255)


def pixels_before_rounding(path: Path, latents: Array) -> Array:
    """What the graph has just before it rounds to bytes."""
    model = onnx.load(path)
    inner = onnx.helper.make_tensor_value_info("images/channels_last", 1, ["B", "H", "W", 3])
    model.graph.output.append(inner)
    probe = path.with_name("probe.onnx")
    onnx.save(model, probe)
    return outputs_of(probe, {"latents": latents})["images/channels_last"]


CHANGES: dict[str, dict[str, Any]] = {
    "sd": {},
    "no quant convolutions": {"use_quant_conv": False, "use_post_quant_conv": False},
    "no attention": {"mid_block_add_attention": False},
    "upcast": {"force_upcast": True, "scaling_factor": 0.13025},
    "scaled and shifted": {"scaling_factor": 0.36, "shift_factor": 0.12},
    "two layers": {"layers_per_block": 2, "levels": 3},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("attention", ["op", "decomposed"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_decoder_does_what_diffusers_does(
    tmp_path: Path,
    latents: Array,
    precision: Any,
    attention: Any,
    changes: dict[str, Any],
) -> None:
    model = tiny_vae(**changes)
    weights = weights_of(model, tmp_path / "vae.safetensors", name="vae")
    options = GraphOptions(precision=precision, attention=attention)
    decoder = tmp_path / "vae_decoder.onnx"
    write_vae_decoder(config_of(model), weights, options, decoder)

    wanted = decoded(model, latents)
    assert (
        relative_error(pixels_before_rounding(decoder, latents), wanted) <= (TOLERANCES[precision])
    )
    got = outputs_of(decoder, {"latents": latents})["images"]
    assert got.dtype == np.uint8
    # Rounding turns the smallest difference into 1 where a pixel is near one half.
    differences = np.abs(got.astype(int) - wanted.round().astype(int))
    assert differences.max() <= 1
    assert np.mean(differences > 0) <= {"fp32": 1e-3, "fp16": 0.1}[precision]


def test_bytes_are_rounded_half_to_even(tmp_path: Path, latents: Array) -> None:
    model = tiny_vae()
    weights = weights_of(model, tmp_path / "vae.safetensors", name="vae")
    path = tmp_path / "vae_decoder.onnx"
    write_vae_decoder(config_of(model), weights, GraphOptions(), path)
    before = pixels_before_rounding(path, latents)
    got = outputs_of(path, {"latents": latents})["images"]
    np.testing.assert_array_equal(got, np.round(before).astype(np.uint8))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_bytes_are_only_at_the_boundary(tmp_path: Path, precision: Any) -> None:
    model = tiny_vae()
    weights = weights_of(model, tmp_path / "vae.safetensors", name="vae")
    decoder = tmp_path / "vae_decoder.onnx"
    write_vae_decoder(config_of(model), weights, GraphOptions(precision=precision), decoder)
    # TensorRT takes uint8 of a network's tensors alone: a Cast gives them itself.
    nodes = onnx.load(decoder).graph.node
    assert [node.op_type for node in nodes if "images" in node.output] == ["Cast"]
    assert "Identity" not in {node.op_type for node in nodes}


def test_an_output_keeps_its_other_readers(tmp_path: Path) -> None:
    path = tmp_path / "g.onnx"
    with GraphBuilder(path, GraphOptions()) as b:
        x = b.input("x", np.float32, ["B"])
        doubled = b.node("Add", x, x, name="doubled")
        b.output(doubled, "twice", np.float32, ["B"])
        b.output(b.node("Add", doubled, x, name="tripled"), "thrice", np.float32, ["B"])
        b.output(doubled, "again", np.float32, ["B"])
        b.output(x, "same", np.float32, ["B"])
        b.output(b.constant(np.ones(1, np.float32), "one"), "one_out", np.float32, [1])
    got = outputs_of(path, {"x": np.array([1, 2], np.float32)})
    assert {name: array.tolist() for name, array in got.items()} == {
        "twice": [2, 4],
        "thrice": [3, 6],
        "again": [2, 4],
        "same": [1, 2],
        "one_out": [1],
    }


@pytest.mark.parametrize("damage", [np.nan, np.inf, -np.inf])
def test_an_image_that_is_not_finite_is_said_to_be_so(
    tmp_path: Path, latents: Array, damage: float
) -> None:
    model = tiny_vae()
    weights = weights_of(model, tmp_path / "vae.safetensors", name="vae")
    path = tmp_path / "vae_decoder.onnx"
    write_vae_decoder(config_of(model), weights, GraphOptions(), path)
    assert outputs_of(path, {"latents": latents})["finite"].tolist() == [1.0] * len(latents)
    damaged = latents.copy()
    damaged[-1, 0, 0, 0] = damage
    finite = outputs_of(path, {"latents": damaged})["finite"]
    assert finite.tolist() == [1.0] * (len(latents) - 1) + [0.0]


@pytest.mark.parametrize("shape", [(), (1, 1)], ids=["linear", "1x1 convolution"])
def test_the_old_names_of_the_attention(
    tmp_path: Path, latents: Array, shape: tuple[int, ...]
) -> None:
    model = tiny_vae()
    new_and_old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old: dict[str, torch.Tensor] = {}
    replaced = []
    for key, value in model.state_dict().items():
        for new, name in new_and_old.items():
            if f"attentions.0.{new}." in key:
                replaced.append(key)
                old[key.replace(new, name)] = (
                    value.reshape(*value.shape, *shape) if value.ndim == 2 else value
                )
    assert len(replaced) == 16
    weights = weights_of(model, tmp_path / "v.safetensors", name="vae", without=replaced, extra=old)
    decoder = tmp_path / "vae_decoder.onnx"
    write_vae_decoder(config_of(model), weights, GraphOptions(), decoder)
    got = pixels_before_rounding(decoder, latents)
    assert relative_error(got, decoded(model, latents)) <= TOLERANCES["fp32"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"latent_channels": 16}, "latent_channels"),
        ({"latents_mean": [0.0] * 4}, "latents_mean"),
        ({"scaling_factor": 0}, "scaling_factor"),
        ({"up_block_types": ["AttnUpDecoderBlock2D"] * 4}, "up_block_types"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 3}, "block_out_channels"),
        ({"layers_per_block": 2}, "resnets.2"),
        ({"use_post_quant_conv": False}, "post_quant_conv"),
        ({"spectral": True}, "spectral"),
    ],
    ids=str,
)
def test_a_config_that_is_not_known_is_named(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    model = tiny_vae()
    weights = weights_of(model, tmp_path / "vae.safetensors", name="vae")
    with pytest.raises(CheckpointError, match=named):
        write_vae_decoder(
            {**config_of(model), **changes}, weights, GraphOptions(), tmp_path / "d.onnx"
        )


def test_a_missing_and_an_unused_tensor_are_named(tmp_path: Path) -> None:
    model = tiny_vae()

    def weights(**changes: Any) -> Weights:
        return weights_of(model, tmp_path / "vae.safetensors", name="vae", **changes)

    key = "decoder.conv_out.bias"
    with pytest.raises(CheckpointError, match=key):
        write_vae_decoder(
            config_of(model), weights(without=[key]), GraphOptions(), tmp_path / "d.onnx"
        )
    for extra in ("decoder.x", "other"):
        more = weights(extra={extra: torch.ones(2)})
        with pytest.raises(CheckpointError, match=extra):
            write_vae_decoder(config_of(model), more, GraphOptions(), tmp_path / "v.onnx")


def written_tiny(folder: Path, model: Any, options: GraphOptions, **config: Any) -> Path:
    weights = weights_of(model, folder / "vae.safetensors", name="vae")
    path = folder / "vae_decoder.onnx"
    write_tiny_decoder({**config_of(model), **config}, weights, options, path)
    return path


@pytest.mark.parametrize(
    "changes",
    [{}, {"levels": 3}, {"scaling_factor": 0.7}, {"num_decoder_blocks": (1, 1, 1, 2)}],
    ids=str,
)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_tiny_decoder_does_what_diffusers_does(
    tmp_path: Path, latents: Array, precision: Any, changes: dict[str, Any]
) -> None:
    model = tiny_decoder_vae(**changes)
    path = written_tiny(tmp_path, model, GraphOptions(precision=precision))
    large = 2 * latents  # the limit of 3 is felt
    got, wanted = pixels_before_rounding(path, large), decoded(model, large)
    assert np.mean((wanted > 0) & (wanted < 255)) > 0.05, "all is clipped"
    assert relative_error(got, wanted) <= TOLERANCES[precision]
    outputs = outputs_of(path, {"latents": large})
    times = 2 ** (changes.get("levels", 4) - 1)
    assert outputs["images"].shape == (2, 5 * times, 6 * times, 3)
    differences = np.abs(outputs["images"].astype(int) - wanted.round().astype(int))
    assert differences.max() <= 1
    assert outputs["finite"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("damage", [np.nan, np.inf, -np.inf])
def test_the_tiny_decoder_does_not_hide_latents_that_are_not_finite(
    tmp_path: Path, latents: Array, damage: float
) -> None:
    path = written_tiny(tmp_path, tiny_decoder_vae(), GraphOptions())
    latents[1, 2, 0, 0] = damage
    assert outputs_of(path, {"latents": latents})["finite"].tolist() == [1.0, 0.0]


def test_the_published_tiny_autoencoder(tmp_path: Path) -> None:
    """The sizes of taesd, taesdxl and sdxs, which are diffusers' defaults."""
    model = tiny_decoder_vae(
        encoder_block_out_channels=(64,) * 4,
        decoder_block_out_channels=(64,) * 4,
        num_encoder_blocks=(1, 3, 3, 3),
        num_decoder_blocks=(3, 3, 3, 1),
    )
    config = config_of(model)
    weights = weights_of(model, tmp_path / "vae.safetensors", name="vae")
    kept = ("_class_name", "in_channels", "latent_channels")
    write_tiny_decoder(
        {key: config[key] for key in kept}, weights, GraphOptions(), tmp_path / "d.onnx"
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"latent_channels": 16}, "latent_channels"),
        ({"act_fn": "gelu"}, "act_fn"),
        ({"upsample_fn": "bilinear"}, "upsample_fn"),
        ({"shift_factor": 0.1}, "shift_factor"),
        ({"upsampling_scaling_factor": 3}, "upsampling_scaling_factor"),
        ({"decoder_block_out_channels": [8, 8, 8, 16]}, "decoder_block_out_channels"),
        ({"decoder_block_out_channels": [8, 8]}, "decoder_block_out_channels"),
        ({"num_decoder_blocks": [2, 3, 2, 2]}, r"decoder\.layers"),
        ({"spectral": True}, "spectral"),
    ],
    ids=str,
)
def test_a_tiny_config_that_is_not_known_is_named(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(CheckpointError, match=named):
        written_tiny(tmp_path, tiny_decoder_vae(), GraphOptions(), **changes)
    assert not list(tmp_path.glob("vae_decoder.onnx*")), "half a graph was left behind"
