"""Single files in the original layout, against diffusers' own conversion of such files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as theirs
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from oracles import ldm
from oracles.models import config_of, tiny_text_encoder, tiny_unet, tiny_vae
from oracles.tokenizers import VOCAB_SIZE, save_tokenizer
from sld_edge.engines.errors import CheckpointError, InputError
from sld_edge.export.checkpoints.checkpoint import Model
from sld_edge.export.checkpoints.sources import checkpoint_from_source
from sld_edge.export.checkpoints.weights import Weights, entries_from_safetensors
from sld_edge.export.graphs.builder import GraphOptions
from sld_edge.export.graphs.unet import write_unet

TEXT_WIDTH = 128  # two heads of 64


def models_of(kind: str) -> dict[str, Any]:
    """The smallest models that the original layout can say: 32 norm groups, heads as published."""
    second = kind == "sd2"
    text = {"text_width": TEXT_WIDTH, "vocab_size": VOCAB_SIZE, "num_attention_heads": 2}
    unet: dict[str, Any] = {
        "block_out_channels": (64, 128) if second else (32, 64),
        "attention_head_dim": (1, 2) if second else 8,
        "norm_num_groups": 32,
        "text_width": TEXT_WIDTH,
        "sample_size": 96 if second else 64,
    }
    return {
        "unet": tiny_unet("sd2" if second else "sd1", **unet),
        "text_encoder": tiny_text_encoder("gelu" if second else "quick_gelu", **text),
        "vae": tiny_vae(block_out_channels=(32, 32, 64, 64), norm_num_groups=32),
    }


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Any], Path]:
    kind: str = request.param
    folder = tmp_path_factory.mktemp(kind)
    save_tokenizer(folder / "tokenizer")
    models = models_of(kind)
    file = ldm.save_ldm_file(folder / "model.safetensors", models, openclip=kind == "sd2")
    return kind, models, file


@pytest.fixture(scope="module")
def sd1_tensors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    file = tmp_path_factory.mktemp("whole") / "one.safetensors"
    return dict(load_file(ldm.save_ldm_file(file, models_of("sd1"), openclip=False)))


def opened(case: tuple[str, dict[str, Any], Path]) -> Any:
    kind, _, file = case
    return checkpoint_from_source(
        str(file), prediction_type="v_prediction" if kind == "sd2" else None
    )


def assert_same_tensors(model: Model, want: dict[str, torch.Tensor]) -> None:
    keys = {key.removeprefix("text_model.") for key in model.weights.keys()}  # noqa: SIM118
    assert keys - {"embeddings.position_ids"} == {key.removeprefix("text_model.") for key in want}
    for key, tensor in want.items():
        name = key if key in model.weights else f"text_model.{key.removeprefix('text_model.')}"
        np.testing.assert_array_equal(model.weights.take(name), tensor.numpy(), err_msg=key)


def test_the_oracles_layout_is_the_original(case: tuple[str, dict[str, Any], Path]) -> None:
    kind, models, file = case
    state = load_file(file)
    unet = theirs.convert_ldm_unet_checkpoint(dict(state), config=dict(models["unet"].config))
    vae = theirs.convert_ldm_vae_checkpoint(dict(state), config=dict(models["vae"].config))
    if kind == "sd2":
        text = theirs.convert_open_clip_checkpoint(models["text_encoder"], dict(state))
        text = {key: t for key, t in text.items() if ".layers.2." not in key}  # the unused block
        text.pop("text_projection.weight", None)
    else:
        text = theirs.convert_ldm_clip_checkpoint(dict(state))
        text.pop("text_model.embeddings.position_ids", None)
    for name, converted in (("unet", unet), ("vae", vae), ("text_encoder", text)):
        want = {k.removeprefix("text_model."): t for k, t in models[name].state_dict().items()}
        got = {k.removeprefix("text_model."): t for k, t in converted.items()}
        assert got.keys() == want.keys(), name
        assert all(torch.equal(got[key], want[key]) for key in want), name


def test_every_tensor_is_found(case: tuple[str, dict[str, Any], Path]) -> None:
    _, models, _ = case
    checkpoint = opened(case)
    for name in ("unet", "vae", "text_encoder"):
        assert_same_tensors(getattr(checkpoint, name), models[name].state_dict())


def test_configs_are_inferred(case: tuple[str, dict[str, Any], Path]) -> None:
    _, models, _ = case
    checkpoint = opened(case)
    for name in ("unet", "vae", "text_encoder"):
        want = config_of(models[name])
        for key, value in getattr(checkpoint, name).config.items():
            if not key.startswith("_") and key != "architectures":
                assert value == want[key], (name, key)


def test_the_graph_is_byte_for_byte_the_one_from_diffusers(
    case: tuple[str, dict[str, Any], Path], tmp_path: Path
) -> None:
    _, models, _ = case
    models["unet"].save_pretrained(tmp_path / "unet")
    unet = opened(case).unet
    entries = entries_from_safetensors(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    options = GraphOptions(precision="fp16")
    for folder, config, weights in (
        ("a", config_of(models["unet"]), Weights(entries, name="unet")),
        ("b", unet.config, unet.weights),
    ):
        (tmp_path / folder).mkdir()
        write_unet(config, weights, options, tmp_path / folder / "unet.onnx")
    for name in ("unet.onnx", "unet.onnx.data"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_published_sizes(kind: str, tmp_path: Path) -> None:
    """The whole architecture of SD 1.5 and 2.1, as a file with holes in place of the weights."""
    second = kind == "sd2"
    width, layers = (1024, 23) if second else (768, 12)
    act = "gelu" if second else "quick_gelu"
    with torch.device("meta"):
        models = {
            "unet": UNet2DConditionModel(
                sample_size=96 if second else 64,
                cross_attention_dim=width,
                attention_head_dim=(5, 10, 20, 20) if second else 8,
                use_linear_projection=second,
            ),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(
                    hidden_size=width,
                    intermediate_size=4 * width,
                    num_hidden_layers=layers,
                    num_attention_heads=width // 64,
                    hidden_act=act,
                )
            ),
            "vae": AutoencoderKL(
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
            ),
        }
        tensors = ldm.ldm_tensors(models, openclip=second)
    # As many as the published UNets and VAE have.
    assert len(models["unet"].state_dict()) == 686
    assert len(models["vae"].state_dict()) == 248
    file = ldm.save_hollow(tmp_path / "model.safetensors", tensors)
    save_tokenizer(tmp_path / "tokenizer")
    checkpoint = checkpoint_from_source(
        str(file), prediction_type="v_prediction" if second else None
    )
    for name, model in models.items():
        ours = getattr(checkpoint, name)
        want = {key.removeprefix("text_model."): t.shape for key, t in model.state_dict().items()}
        got = {
            key.removeprefix("text_model."): ours.weights.shape(key)
            for key in ours.weights.keys()  # noqa: SIM118 -- no mapping
            if not key.endswith("position_ids")
        }
        assert got == {key: tuple(shape) for key, shape in want.items()}, name
        published = config_of(model)
        for key, value in ours.config.items():
            if not key.startswith("_") and key != "architectures":
                assert value == published[key], (name, key)


def test_source_prediction_and_tokenizer(case: tuple[str, dict[str, Any], Path]) -> None:
    kind, _, _ = case
    checkpoint = opened(case)
    assert (checkpoint.id, checkpoint.source) == ("model.safetensors", "ldm-file")
    predicts = "v_prediction" if kind == "sd2" else "epsilon"
    assert checkpoint.scheduler["prediction_type"] == predicts
    assert checkpoint.scheduler["beta_schedule"] == "scaled_linear"
    pad = '"pad_id":0' if kind == "sd2" else f'"pad_id":{VOCAB_SIZE - 1}'
    assert pad in checkpoint.tokenizer_json


def test_only_sd2_must_be_told_what_it_predicts(
    case: tuple[str, dict[str, Any], Path],
) -> None:
    kind, _, file = case
    if kind == "sd1":
        assert checkpoint_from_source(str(file)).scheduler["prediction_type"] == "epsilon"
        return
    with pytest.raises(CheckpointError, match=r"give --prediction-type v_prediction") as caught:
        checkpoint_from_source(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no vae", "no VAE"),
        ("no text encoder", "no text encoder"),
        ("only a unet, unprefixed", "no UNet, no VAE, no text encoder"),
        ("sdxl", "SDXL"),
        ("a block missing", "blocks are not those of Stable Diffusion"),
        ("no tokenizer", "give CLIP's with --tokenizer"),
        ("cut short", "cut short"),
        ("variant", "--variant does not apply"),
    ],
)
def test_bad_files_are_one_line(
    damage: str, message: str, sd1_tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    file, tensors = tmp_path / "one.safetensors", dict(sd1_tensors)
    if damage != "no tokenizer":
        save_tokenizer(tmp_path / "tokenizer")
    gone = {
        "no vae": "first_stage_model.",
        "no text encoder": "cond_stage_model.",
        "a block missing": "model.diffusion_model.input_blocks.1.",
    }
    if damage in gone:
        tensors = {k: t for k, t in tensors.items() if not k.startswith(gone[damage])}
    elif damage == "only a unet, unprefixed":
        tensors = {"conv_in.weight": torch.zeros(4)}
    elif damage == "sdxl":
        tensors["conditioner.embedders.0.transformer.x"] = torch.zeros(1)
    save_file(tensors, file)
    if damage == "cut short":
        file.write_bytes(file.read_bytes()[:-1000])
    error = InputError if damage == "variant" else CheckpointError
    with pytest.raises(error, match=message) as caught:
        checkpoint_from_source(str(file), variant="fp16" if damage == "variant" else None)
    assert "\n" not in str(caught.value)
