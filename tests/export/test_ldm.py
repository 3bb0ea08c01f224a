"""Single files in the original layout, against diffusers' own conversion of such files."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as theirs
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from oracles import ldm
from oracles.models import (
    POOLED_WIDTH,
    config_of,
    tiny_pooled_text_encoder,
    tiny_text_encoder,
    tiny_unet,
    tiny_vae,
)
from oracles.tokenizers import VOCAB_SIZE, save_tokenizer
from sld_edge.engines.errors import CheckpointError, InputError
from sld_edge.export.checkpoints.checkpoint import Model
from sld_edge.export.checkpoints.ldm import (
    models_from_ldm_file,
)
from sld_edge.export.checkpoints.sources import checkpoint_from_source
from sld_edge.export.checkpoints.weights import Weights, entries_from_safetensors
from sld_edge.export.graphs.builder import GraphOptions
from sld_edge.export.graphs.clip import write_text_encoder
from sld_edge.export.graphs.unet import write_unet
from sld_edge.export.graphs.vae import write_vae_decoder

TEXT_WIDTH = 128  # two heads of 64
SECOND_WIDTH = 192  # of SDXL's second text encoder, with three
CaseOf = tuple[str, dict[str, Any], Path]


def models_of(kind: str) -> dict[str, Any]:
    """The smallest models that the original layout can say: 32 norm groups, heads as published."""
    text = {"text_width": TEXT_WIDTH, "vocab_size": VOCAB_SIZE, "num_attention_heads": 2}
    unet: dict[str, Any] = {"norm_num_groups": 32, "text_width": TEXT_WIDTH}
    vae: dict[str, Any] = {"block_out_channels": (32, 32, 64, 64), "norm_num_groups": 32}
    if kind == "sdxl":
        second = {**text, "text_width": SECOND_WIDTH, "num_attention_heads": 3}
        unet.update(
            block_out_channels=(64, 128, 192),
            attention_head_dim=(1, 2, 3),
            text_width=TEXT_WIDTH + SECOND_WIDTH,
            sample_size=128,
        )
        return {
            "unet": tiny_unet("sdxl", **unet),
            "text_encoder": tiny_text_encoder("quick_gelu", **text),
            "text_encoder_2": tiny_pooled_text_encoder("gelu", **second),
            "vae": tiny_vae(scaling_factor=0.13025, **vae),
        }
    second_version = kind == "sd2"
    unet.update(
        block_out_channels=(64, 128) if second_version else (32, 64),
        attention_head_dim=(1, 2) if second_version else 8,
        sample_size=96 if second_version else 64,
    )
    return {
        "unet": tiny_unet("sd2" if second_version else "sd1", **unet),
        "text_encoder": tiny_text_encoder("gelu" if second_version else "quick_gelu", **text),
        "vae": tiny_vae(**vae),
    }


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], CaseOf]:
    @cache
    def made(kind: str) -> CaseOf:
        folder = tmp_path_factory.mktemp(kind)
        save_tokenizer(folder / "tokenizer")
        models = models_of(kind)
        file = ldm.save_ldm_file(folder / "model.safetensors", models, openclip=kind == "sd2")
        return kind, models, file

    return made


@pytest.fixture(params=["sd1", "sd2"])
def case(request: pytest.FixtureRequest, case_of: Callable[[str], CaseOf]) -> CaseOf:
    return case_of(request.param)


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def any_case(request: pytest.FixtureRequest, case_of: Callable[[str], CaseOf]) -> CaseOf:
    return case_of(request.param)


@pytest.fixture(scope="module")
def sd1_tensors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    file = tmp_path_factory.mktemp("whole") / "one.safetensors"
    return dict(load_file(ldm.save_ldm_file(file, models_of("sd1"), openclip=False)))


def prediction_of(kind: str) -> str | None:
    return "v_prediction" if kind == "sd2" else None


def opened(case: CaseOf) -> Any:
    kind, _, file = case
    return checkpoint_from_source(str(file), prediction_type=prediction_of(kind))


def models_in(case: CaseOf) -> dict[str, Model]:
    kind, _, file = case
    return models_from_ldm_file(file, prediction_type=prediction_of(kind))


def assert_same_tensors(model: Model, want: dict[str, torch.Tensor]) -> None:
    keys = {key.removeprefix("text_model.") for key in model.weights.keys()}  # noqa: SIM118
    assert keys - {"embeddings.position_ids"} == {key.removeprefix("text_model.") for key in want}
    for key, tensor in want.items():
        name = key if key in model.weights else f"text_model.{key.removeprefix('text_model.')}"
        np.testing.assert_array_equal(model.weights.take(name), tensor.numpy(), err_msg=key)


def test_the_oracles_layout_is_the_original(any_case: CaseOf) -> None:
    kind, models, file = any_case
    state = load_file(file)
    converted = {
        "unet": theirs.convert_ldm_unet_checkpoint(dict(state), config=dict(models["unet"].config)),
        "vae": theirs.convert_ldm_vae_checkpoint(dict(state), config=dict(models["vae"].config)),
    }
    if kind == "sd2":
        text = theirs.convert_open_clip_checkpoint(models["text_encoder"], dict(state))
        text = {key: t for key, t in text.items() if ".layers.2." not in key}  # the unused block
        text.pop("text_projection.weight", None)
    else:
        text = theirs.convert_ldm_clip_checkpoint(dict(state))
        text.pop("text_model.embeddings.position_ids", None)
    converted["text_encoder"] = text
    if kind == "sdxl":
        converted["text_encoder_2"] = theirs.convert_open_clip_checkpoint(
            models["text_encoder_2"], dict(state), prefix="conditioner.embedders.1.model."
        )
    assert converted.keys() == models.keys()
    for name, tensors in converted.items():
        want = {k.removeprefix("text_model."): t for k, t in models[name].state_dict().items()}
        got = {k.removeprefix("text_model."): t for k, t in tensors.items()}
        assert got.keys() == want.keys(), name
        assert all(torch.equal(got[key], want[key]) for key in want), name


def test_every_tensor_is_found(any_case: CaseOf) -> None:
    _, models, _ = any_case
    got = models_in(any_case)
    assert got.keys() == models.keys()
    for name, model in models.items():
        assert got[name].weights.name == name
        assert_same_tensors(got[name], model.state_dict())


def test_configs_are_inferred(any_case: CaseOf) -> None:
    _, models, _ = any_case
    for name, model in models_in(any_case).items():
        want = config_of(models[name])
        for key, value in model.config.items():
            if not key.startswith("_") and key != "architectures":
                assert value == want[key], (name, key)


def test_a_checkpoint_has_the_same_models(case: CaseOf) -> None:
    checkpoint = opened(case)
    for name, model in models_in(case).items():
        same = checkpoint.models[name]
        assert same.config == model.config
        assert same.weights.keys() == model.weights.keys()


def test_the_graphs_are_byte_for_byte_those_from_diffusers(
    any_case: CaseOf, tmp_path: Path
) -> None:
    kind, models, _ = any_case
    options = GraphOptions(precision="fp16")
    states = partial(write_text_encoder, layer="penultimate")
    writers: dict[str, Any] = {
        "unet": write_unet,
        "vae": write_vae_decoder,
        "text_encoder": states if kind == "sdxl" else write_text_encoder,
        "text_encoder_2": partial(states, pooled=True),
    }
    for name, model in models_in(any_case).items():
        models[name].save_pretrained(tmp_path / name)
        (file,) = (tmp_path / name).glob("*.safetensors")
        weights = Weights(entries_from_safetensors(file), name=name)
        for folder, config, tensors in (
            ("a", config_of(models[name]), weights),
            ("b", model.config, model.weights.renamed(_unprefixed(model, weights))),
        ):
            (tmp_path / folder).mkdir(exist_ok=True)
            writers[name](config, tensors, options, tmp_path / folder / f"{name}.onnx")
        for end in ("onnx", "onnx.data"):
            one, other = ((tmp_path / folder / f"{name}.{end}").read_bytes() for folder in "ab")
            assert one == other, f"{name}.{end}"


def _unprefixed(model: Model, like: Weights) -> dict[str, str]:
    """transformers 5 saves text encoders without the prefix that published files have."""
    keys = model.weights.keys()
    return {key: key.removeprefix("text_model.") for key in keys if key not in like}


def test_published_sizes_of_sdxl(tmp_path: Path) -> None:
    """The whole architecture of SDXL, as a file with holes in place of the weights."""
    with torch.device("meta"):
        models: dict[str, Any] = {
            "unet": UNet2DConditionModel(
                sample_size=128,
                block_out_channels=(320, 640, 1280),
                down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 2),
                up_block_types=(*("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
                cross_attention_dim=2048,
                attention_head_dim=(5, 10, 20),
                transformer_layers_per_block=(1, 2, 10),
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            ),
            "text_encoder": _published_text(CLIPTextModel, 768, 12, "quick_gelu"),
            "text_encoder_2": _published_text(
                CLIPTextModelWithProjection, 1280, 32, "gelu", projection_dim=1280
            ),
            "vae": _published_vae(scaling_factor=0.13025),
        }
        tensors = ldm.ldm_tensors(models, openclip=False)
    assert len(models["unet"].state_dict()) == 1680  # as many as the published UNet has
    file = ldm.save_hollow(tmp_path / "model.safetensors", tensors)
    assert_published(models_from_ldm_file(file), models)


def _published_text(kind: Any, width: int, layers: int, act: str, **more: int) -> Any:
    return kind(
        CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            hidden_act=act,
            **more,
        )
    )


def _published_vae(**changes: Any) -> Any:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        **changes,
    )


def assert_published(got: dict[str, Model], models: dict[str, Any]) -> None:
    """Names, shapes and configs are those of the published models."""
    assert got.keys() == models.keys()
    for name, model in models.items():
        weights = got[name].weights
        want = {key.removeprefix("text_model."): t.shape for key, t in model.state_dict().items()}
        shapes = {
            key.removeprefix("text_model."): weights.shape(key)
            for key in weights.keys()  # noqa: SIM118 -- no mapping
            if not key.endswith("position_ids")
        }
        assert shapes == {key: tuple(shape) for key, shape in want.items()}, name
        published = config_of(model)
        for key, value in got[name].config.items():
            if not key.startswith("_") and key != "architectures":
                assert value == published[key], (name, key)


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
            "text_encoder": _published_text(CLIPTextModel, width, layers, act),
            "vae": _published_vae(),
        }
        tensors = ldm.ldm_tensors(models, openclip=second)
    # As many as the published UNets and VAE have.
    assert len(models["unet"].state_dict()) == 686
    assert len(models["vae"].state_dict()) == 248
    file = ldm.save_hollow(tmp_path / "model.safetensors", tensors)
    assert_published(models_from_ldm_file(file, prediction_type=prediction_of(kind)), models)


def test_source_prediction_and_tokenizer(case: CaseOf) -> None:
    kind, _, _ = case
    checkpoint = opened(case)
    assert (checkpoint.id, checkpoint.source) == ("model.safetensors", "ldm-file")
    predicts = "v_prediction" if kind == "sd2" else "epsilon"
    assert checkpoint.scheduler["prediction_type"] == predicts
    assert checkpoint.scheduler["beta_schedule"] == "scaled_linear"
    pad = '"pad_id":0' if kind == "sd2" else f'"pad_id":{VOCAB_SIZE - 1}'
    assert pad in checkpoint.tokenizers["text_encoder"]


def test_an_sdxl_file_has_two_tokenizers_and_eulers_scheduler(
    case_of: Callable[[str], CaseOf],
) -> None:
    checkpoint = opened(case_of("sdxl"))
    assert checkpoint.scheduler["_class_name"] == "EulerDiscreteScheduler"
    assert checkpoint.scheduler["prediction_type"] == "epsilon"
    assert checkpoint.scheduler["beta_end"] == 0.012
    assert f'"pad_id":{VOCAB_SIZE - 1}' in checkpoint.tokenizers["text_encoder"]
    assert '"pad_id":0' in checkpoint.tokenizers["text_encoder_2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("conditioner.embedders.0.", "no text encoder 1"),
        ("conditioner.embedders.1.", "no text encoder 2"),
        ("conditioner.embedders.1.model.text_projection", "lacks tensor .*text_projection"),
        ("model.diffusion_model.label_emb.0.0.weight", r"lacks tensor label_emb\.0\.0\.weight"),
        ("wider projection", "label_emb.0.0.weight takes 56 numbers"),
        ("flat projection", "text_encoder_2: the projection"),
        ("refiner", "refiner"),
        ("unclip", "unCLIP"),
    ],
)
def test_bad_sdxl_files_are_one_line(change: str, message: str, tmp_path: Path) -> None:
    tensors = ldm.ldm_tensors(models_of("sdxl"), openclip=False)
    projection = "conditioner.embedders.1.model.text_projection"
    tensors = {k: t for k, t in tensors.items() if not k.startswith(change)}
    if change == "wider projection":
        tensors[projection] = torch.zeros(SECOND_WIDTH, POOLED_WIDTH + 1)
    elif change == "flat projection":
        tensors[projection] = torch.zeros(SECOND_WIDTH)
    elif change == "refiner":
        tensors["conditioner.embedders.0.model.ln_final.weight"] = torch.zeros(1)
    elif change == "unclip":
        tensors = {k: t for k, t in tensors.items() if not k.startswith("conditioner.")}
        tensors["cond_stage_model.model.ln_final.weight"] = torch.zeros(1)
    file = tmp_path / "one.safetensors"
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, file)
    with pytest.raises(CheckpointError, match=message) as caught:
        models_from_ldm_file(file)
    assert "\n" not in str(caught.value)


def test_only_sd2_must_be_told_what_it_predicts(
    case: CaseOf,
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
        ("half of sdxl", "no text encoder 2"),
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
    elif damage == "half of sdxl":
        tensors["conditioner.embedders.0.transformer.x"] = torch.zeros(1)
    save_file(tensors, file)
    if damage == "cut short":
        file.write_bytes(file.read_bytes()[:-1000])
    error = InputError if damage == "variant" else CheckpointError
    with pytest.raises(error, match=message) as caught:
        checkpoint_from_source(str(file), variant="fp16" if damage == "variant" else None)
    assert "\n" not in str(caught.value)
