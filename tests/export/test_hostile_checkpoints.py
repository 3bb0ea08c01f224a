"""Files of a checkpoint are hostile until checked: they are taken, or refused with one line."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from sld_edge.engines.errors import CheckpointError, EngineError, UserError
from sld_edge.export.checkpoints.sources import checkpoint_from_source
from sld_edge.export.scorers import ScorerSettings, export_scorer
from sld_edge.export.settings import ExportSettings
from sld_edge.export.write_bundle import export_bundle
from sld_edge.runtime.scorers.folder import ScorerFolder

ORIGINAL = Path(__file__).parents[2] / "benchmarks" / "miniworld" / "checkpoint"
CONFIGS = ("text_encoder/config.json", "unet/config.json", "vae/config.json")
JSONS = (
    *CONFIGS,
    "scheduler/scheduler_config.json",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
)
WEIGHTS = (
    "text_encoder/model.safetensors",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
)
EVERY = (*JSONS, "tokenizer/merges.txt", *WEIGHTS)
ODD: tuple[Any, ...] = (None, "x", [], {}, -1, 10**30, 1e300, True, [[["x"]]], float("inf"))
_LINE = 300


def linked(folder: Path) -> Path:
    """A checkpoint of links, as the Hub's cache has it; a file is replaced by removing its link."""
    for name in EVERY:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(ORIGINAL / name)
    return folder


def replaced(folder: Path, name: str, data: bytes) -> None:
    (folder / name).unlink()
    (folder / name).write_bytes(data)


def taken_or_one_line(attempt: Callable[[], object]) -> UserError | None:
    """Return the error, if any; anything but one short line fails the test."""
    error = None
    try:
        attempt()
    except UserError as caught:
        error = caught
    if error is not None:
        assert len(str(error)) <= _LINE, str(error)
        assert str(error).isprintable()
    return error


def opened(folder: Path) -> UserError | None:
    error = taken_or_one_line(lambda: checkpoint_from_source(str(folder)))
    assert error is None or isinstance(error, CheckpointError)
    return error


def exported(folder: Path, place: Path) -> UserError | None:
    settings = ExportSettings(model=str(folder), output=place / "bundle", preset="medium")
    error = taken_or_one_line(lambda: export_bundle(settings))
    if error is not None:
        assert list(place.iterdir()) == []  # nor a part of it
    return error


def with_odd_value(name: str, rng: random.Random) -> bytes:
    body = json.loads((ORIGINAL / name).read_text(encoding="utf-8"))
    body[rng.choice(sorted(body))] = rng.choice(ODD)
    return json.dumps(body).encode()


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Flip some bits, most of them near the start, or cut the end off."""
    if rng.random() < 0.3:
        return data[: rng.randrange(len(data))]
    flipped = bytearray(data)
    for _ in range(rng.choice((1, 1, 4, 32))):
        reach = rng.choice((16, 2000, len(data)))
        flipped[rng.randrange(min(reach, len(data)))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def test_a_checkpoint_of_links_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert exported(linked(tmp_path / "model"), tmp_path / "out") is None


@pytest.mark.parametrize("seed", range(60))
def test_damaged_files(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    folder, name = linked(tmp_path / "model"), rng.choice(EVERY)
    replaced(folder, name, damaged((ORIGINAL / name).read_bytes(), rng))
    opened(folder)


@pytest.mark.parametrize("seed", range(40))
def test_odd_values(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    folder, name = linked(tmp_path / "model"), rng.choice(JSONS)
    replaced(folder, name, with_odd_value(name, rng))
    opened(folder)


@pytest.mark.parametrize("seed", range(24))
def test_odd_values_in_what_graphs_and_manifest_are_made_from(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    folder, name = linked(tmp_path / "model"), rng.choice((*CONFIGS, JSONS[3]))
    replaced(folder, name, with_odd_value(name, rng))
    (tmp_path / "out").mkdir()
    exported(folder, tmp_path / "out")


@pytest.mark.parametrize("name", EVERY)
def test_a_pipe_in_a_files_place_is_refused_without_waiting(name: str, tmp_path: Path) -> None:
    folder = linked(tmp_path / "model")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert "not a regular file" in str(opened(folder))


@pytest.mark.parametrize("name", EVERY)
def test_a_device_in_a_files_place_is_refused(name: str, tmp_path: Path) -> None:
    folder = linked(tmp_path / "model")
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    assert "not a regular file" in str(opened(folder))


@pytest.mark.parametrize("name", JSONS)
@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "null", '"x"', "[]", '{"a": NaN}', "{}", "\xff"]
)
def test_files_that_hold_something_else(name: str, text: str, tmp_path: Path) -> None:
    folder = linked(tmp_path / "model")
    replaced(folder, name, text.encode("latin1"))
    error = opened(folder)
    assert text == "{}" or error is not None


HEADERS: dict[str, Any] = {
    "no object": [],
    "entry is text": {"a": "x"},
    "dtype is a number": {"a": {"dtype": 3, "shape": [1], "data_offsets": [0, 4]}},
    "dtype unknown": {"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}},
    "shape is text": {"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}},
    "shape is negative": {"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}},
    "shape is a fraction": {"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}},
    "shape is huge": {"a": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}},
    "one offset": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}},
    "offsets null": {"a": {"dtype": "F32", "shape": [1], "data_offsets": None}},
    "offsets backwards": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
    "too far": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [10**30, 10**30 + 4]}},
    "long name": {"x." * 5000: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
    "overlap": {n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"},
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_of_the_wrong_kind(case: str, tmp_path: Path) -> None:
    header = json.dumps(HEADERS[case]).encode()
    folder = linked(tmp_path / "model")
    replaced(folder, WEIGHTS[1], len(header).to_bytes(8, "little") + header + bytes(4))
    assert opened(folder) is not None


@pytest.mark.parametrize("seed", range(20))
def test_single_files(seed: int, tmp_path: Path) -> None:
    """Tensors with the original layout's names and shapes of any kind."""
    rng = random.Random(seed)
    names = (
        "model.diffusion_model.input_blocks.0.0.weight",
        "model.diffusion_model.output_blocks.0.0.weight",
        "model.diffusion_model.out.2.weight",
        "model.diffusion_model.input_blocks.0.0.out_layers.3.weight",
        "model.diffusion_model.input_blocks.0.1.norm.weight",
        "model.diffusion_model.middle_block.1.attn2.to_k.weight",
        "model.diffusion_model.middle_block.1.proj_in.weight",
        "first_stage_model.encoder.down.0.block.0.conv1.weight",
        "first_stage_model.decoder.mid.attn_1.q.weight",
        "first_stage_model.post_quant_conv.weight",
        "cond_stage_model.model.token_embedding.weight",
        "cond_stage_model.model.positional_embedding",
        "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight",
        "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight",
        "cond_stage_model.model.transformer.resblocks.0.mlp.c_fc.weight",
    )
    kept = [name for name in names if rng.random() < 0.95]
    shapes = [[rng.choice((0, 1, 2, 3, 6)) for _ in range(rng.randrange(5))] for _ in kept]
    file = tmp_path / "one.safetensors"
    save_file({n: np.zeros(shape, np.float16) for n, shape in zip(kept, shapes, strict=True)}, file)
    error = taken_or_one_line(
        lambda: checkpoint_from_source(
            str(file), tokenizer=ORIGINAL / "tokenizer", prediction_type="epsilon"
        )
    )
    assert isinstance(error, CheckpointError)


def test_models_that_cannot_be_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("x" * 5000, "a\0b", f"{tmp_path}/pipe", "\ud800"):
        error = taken_or_one_line(lambda name=name: checkpoint_from_source(name))  # type: ignore[misc]
        assert isinstance(error, CheckpointError)


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("key", ["model_type", "vision_config", "projection_dim"])
def test_scorers_of_odd_models(key: str, value: Any, tmp_path: Path) -> None:
    config = {"model_type": "clip", "vision_config": {"image_size": 32}, "projection_dim": 8}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, key: value}))
    save_file({"logit_scale": np.zeros(1, np.float32)}, tmp_path / "model" / "model.safetensors")
    settings = ScorerSettings(
        scorer="clip-score", model=tmp_path / "model", output=tmp_path / "out"
    )
    error = taken_or_one_line(lambda: export_scorer(settings))
    assert isinstance(error, CheckpointError)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("key", ["scorer", "source", "image_size", "text_length", "files", "path"])
def test_scorer_folders_that_lie(key: str, value: Any, tmp_path: Path) -> None:
    file = {"path": "head.onnx", "sha256": "0" * 64, "bytes": 1}
    body: dict[str, Any] = {"format": "sld-edge-scorer", "format_version": 1, "scorer": "q16"}
    body |= {"source": "s", "created_by": "c", "image_size": 8, "text_length": 0, "files": [file]}
    (file if key == "path" else body)[key] = value
    (tmp_path / "scorer.json").write_text(json.dumps(body))
    error = taken_or_one_line(lambda: ScorerFolder(tmp_path, "q16"))
    strange = {"path": ("x",), "source": ("x",)}.get(key, ())  # names are free
    assert isinstance(error, EngineError) or value in strange
