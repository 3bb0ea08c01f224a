"""Where checkpoints come from, and one line for everything that is wrong with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import load_file, save_file

from oracles.models import save_diffusers_directory
from oracles.tokenizers import VOCAB_SIZE, save_tokenizer
from sld_edge.engines.errors import CheckpointError, InputError, UserError
from sld_edge.export.checkpoints.checkpoint import Checkpoint
from sld_edge.export.checkpoints.sources import ALIASES, checkpoint_from_source

UNET_FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("original") / "tiny"
    save_diffusers_directory(root, "sd1", vocab_size=VOCAB_SIZE)
    save_tokenizer(root / "tokenizer")
    return root


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to damage."""
    return Path(shutil.copytree(original, tmp_path / "tiny"))


def unet_tensors(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    weights = checkpoint.models["unet"].weights
    return {key: weights.take(key) for key in weights.keys()}  # noqa: SIM118 -- no mapping


def assert_one_line(caught: pytest.ExceptionInfo[UserError]) -> None:
    assert "\n" not in str(caught.value)


def shard(unet: Path, index: str = f"{UNET_FILE}.index.json") -> dict[str, str]:
    """Split the UNet's file in two, with an index, as diffusers does; return the index's map."""
    tensors = load_file(unet / UNET_FILE)
    names = sorted(tensors)
    places: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        name = f"diffusion_pytorch_model-{number:05}-of-00002.safetensors"
        save_file({key: tensors[key] for key in part}, unet / name)
        places |= dict.fromkeys(part, name)
    (unet / UNET_FILE).unlink()
    (unet / index).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


def test_directory(original: Path) -> None:
    checkpoint = checkpoint_from_source(str(original))
    assert checkpoint.id == "tiny"  # never the path of this machine
    assert checkpoint.source == "diffusers-directory"
    assert checkpoint.scheduler["_class_name"] == "PNDMScheduler"
    want = load_file(original / "unet" / UNET_FILE)
    got = unet_tensors(checkpoint)
    assert got.keys() == want.keys()
    for key, tensor in want.items():
        np.testing.assert_array_equal(got[key], tensor)


def test_sharded_directory_gives_the_same_tensors(original: Path, folder: Path) -> None:
    shard(folder / "unet")
    got = unet_tensors(checkpoint_from_source(str(folder)))
    want = unet_tensors(checkpoint_from_source(str(original)))
    assert got.keys() == want.keys()
    assert all(np.array_equal(got[key], want[key]) for key in want)


def test_fp16_variant_files(tmp_path: Path) -> None:
    save_diffusers_directory(
        tmp_path / "half", "sd1", vocab_size=VOCAB_SIZE, variant="fp16", half=True
    )
    save_tokenizer(tmp_path / "half" / "tokenizer")
    for variant in ("fp16", None):  # only one kind of file is there, so it need not be named
        checkpoint = checkpoint_from_source(str(tmp_path / "half"), variant=variant)
        assert checkpoint.models["unet"].weights.take("conv_in.weight").dtype == np.float16


def test_plain_files_go_before_variants(folder: Path) -> None:
    tensors = load_file(folder / "unet" / UNET_FILE)
    half = {key: tensor.astype(np.float16) for key, tensor in tensors.items()}
    save_file(half, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    plain = checkpoint_from_source(str(folder))
    assert plain.models["unet"].weights.take("conv_in.weight").dtype == np.float32
    with pytest.raises(CheckpointError, match=r"no weights in .*vae") as caught:
        checkpoint_from_source(str(folder), variant="fp16")
    assert_one_line(caught)


def test_sharded_variant(folder: Path) -> None:
    for part in ("vae", "text_encoder"):
        for file in (folder / part).glob("*.safetensors"):
            file.rename(file.with_suffix(".fp16.safetensors"))
    shard(folder / "unet", index=f"{UNET_FILE}.index.fp16.json")
    assert len(unet_tensors(checkpoint_from_source(str(folder), variant="fp16"))) > 100


def test_prediction_type_replaces_the_schedulers(original: Path) -> None:
    checkpoint = checkpoint_from_source(str(original), prediction_type="v_prediction")
    assert checkpoint.scheduler["prediction_type"] == "v_prediction"
    with pytest.raises(InputError, match="prediction type"):
        checkpoint_from_source(str(original), prediction_type="noise")


def test_tokenizer_from_elsewhere(folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    save_tokenizer(tmp_path / "words", files="json")
    for place in (tmp_path / "words", tmp_path / "words" / "tokenizer.json"):
        assert (
            "the" in checkpoint_from_source(str(folder), tokenizer=place).tokenizers["text_encoder"]
        )
    with pytest.raises(InputError, match="no tokenizer at"):
        checkpoint_from_source(str(folder), tokenizer=tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no unet folder", "not a whole diffusers directory . got no unet"),
        ("no scheduler folder", "got no scheduler"),
        ("no tokenizer folder", "got no tokenizer"),
        ("two text encoders", "got no tokenizer_2"),
        ("no config", "cannot read .*config.json"),
        ("broken config", "not whole JSON"),
        ("config is a list", "expected a JSON object"),
        ("no scheduler config", "cannot read .*scheduler_config.json"),
        ("no weights", "no weights in"),
        ("only a pickle", "is a pickle"),
        ("cut short", "cut short"),
        ("empty file", "not a whole safetensors file"),
        ("html page", "not a whole safetensors file"),
        ("index: no map", "has no weight_map"),
        ("index: no shard", "cannot read .*00002"),
        ("index: wrong shard", "is wrong: .* lacks tensor"),
        ("index: outside", "outside its folder"),
        ("index: broken", "not whole JSON"),
    ],
)
def test_bad_directories_are_one_line(damage: str, message: str, folder: Path) -> None:
    unet = folder / "unet"
    kind, _, what = damage.partition(": ")
    if damage.endswith(" folder"):
        shutil.rmtree(folder / damage.split()[1])
    elif damage == "two text encoders":
        (folder / "text_encoder_2").mkdir()
    elif damage == "no config":
        (unet / "config.json").unlink()
    elif damage == "broken config":
        (unet / "config.json").write_text("{")
    elif damage == "config is a list":
        (unet / "config.json").write_text("[]")
    elif damage == "no scheduler config":
        (folder / "scheduler" / "scheduler_config.json").unlink()
    elif damage == "no weights":
        (unet / UNET_FILE).unlink()
    elif damage == "only a pickle":
        (unet / UNET_FILE).rename(unet / "diffusion_pytorch_model.bin")
    elif damage == "cut short":
        raw = (unet / UNET_FILE).read_bytes()
        (unet / UNET_FILE).write_bytes(raw[: len(raw) // 2])
    elif damage == "empty file":
        (unet / UNET_FILE).write_bytes(b"")
    elif damage == "html page":
        (unet / UNET_FILE).write_bytes(b"<!doctype html><title>404</title>" * 10)
    elif kind == "index":
        index = unet / f"{UNET_FILE}.index.json"
        places = shard(unet)
        if what == "no map":
            places = {}
        elif what == "no shard":
            (unet / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
        elif what == "wrong shard":
            places["conv_in.weight"] = next(
                name for name in places.values() if name != places["conv_in.weight"]
            )
        elif what == "outside":
            places["conv_in.weight"] = "../vae/diffusion_pytorch_model.safetensors"
        index.write_text(
            "{" if what == "broken" else json.dumps({"weight_map": places}), encoding="utf-8"
        )
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint_from_source(str(folder))
    assert_one_line(caught)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.pth", "model.bin", "A.CKPT"])
def test_pickles_are_refused_with_the_way_out(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x02.")
    with pytest.raises(CheckpointError, match=r"run any code.*save_pretrained") as caught:
        checkpoint_from_source(str(tmp_path / name))
    assert_one_line(caught)


@pytest.mark.parametrize(
    "name", ["no-such-alias", "./nowhere", "/no/such/dir", "a/b/c", "missing.safetensors", ""]
)
def test_unknown_models_name_the_choices(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"no model .*sd-1\.5") as caught:
        checkpoint_from_source(name)
    assert_one_line(caught)


@pytest.mark.parametrize("name", [*ALIASES, "someone/some-model"])
def test_offline_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("a\nlong\nstory")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match=r"cannot get .* from the Hugging Face Hub") as caught:
        checkpoint_from_source(name)
    assert_one_line(caught)


def test_hub_download_takes_one_copy_of_the_weights_and_no_pickle(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Path(shutil.copytree(original, tmp_path / "0123abcd"))
    asked: dict[str, object] = {}

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(hub)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    checkpoint = checkpoint_from_source("sd-1.5")
    assert checkpoint.id == "sd-1.5"
    assert checkpoint.source == f"hub:{ALIASES['sd-1.5']}@0123abcd"
    patterns = asked["patterns"]
    files = [
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/config.json",
        "text_encoder/model.safetensors",
        "safety_checker/model.safetensors",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
        "scheduler/scheduler_config.json",
        "v1-5-pruned.ckpt",
        "v1-5-pruned.safetensors",
    ]
    kept = list(huggingface_hub.utils.filter_repo_objects(files, allow_patterns=patterns))
    assert kept == [files[i] for i in (0, 4, 5, 7, 8, 9)]
    checkpoint_from_source("someone/some-model@v2")
    assert (asked["repo"], asked["revision"]) == ("someone/some-model", "v2")
