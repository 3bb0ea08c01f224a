"""A Stable Diffusion checkpoint: three models' configs and tensors, scheduler and tokenizer."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sld_edge.engines.checks import whole_number
from sld_edge.engines.errors import CheckpointError, InputError
from sld_edge.engines.files import json_from_file
from sld_edge.export.checkpoints.config import MOST, MOST_POSITIONS
from sld_edge.export.checkpoints.tokenizer import tokenizer_json_from_path
from sld_edge.export.checkpoints.weights import Entry, Weights, entries_from_safetensors
from sld_edge.export.refuse import refusing

# Folder of a diffusers directory -> how its weight files are called.
WEIGHT_STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_MOST_SHARDS = 100
_AGAIN = "download it again"
_SAFE_COPY = "make a safe copy with diffusers: save_pretrained(DIR, safe_serialization=True)"


@dataclass(frozen=True, kw_only=True)
class Model:
    """One model: its config in diffusers' (or transformers') words, and its tensors."""

    config: dict[str, Any]
    weights: Weights


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """All that a bundle is made from.

    `id` is what the user named, `source` where it came from (`diffusers-directory`,
    `hub:<id>@<revision>` or `ldm-file`), `scheduler` the content of scheduler_config.json.
    """

    id: str
    source: str
    unet: Model
    text_encoder: Model
    vae: Model
    scheduler: dict[str, Any]
    tokenizer_json: str


def checkpoint_from_directory(
    root: Path,
    *,
    id: str,
    source: str = "diffusers-directory",
    variant: str | None = None,
    tokenizer: Path | None = None,
) -> Checkpoint:
    """Open a diffusers directory; tensors stay on disk until a graph takes them.

    Args:
        root: has the folders unet, vae, text_encoder, scheduler and tokenizer.
        id: what the user named.
        source: see Checkpoint.
        variant: "fp16" reads `*.fp16.safetensors`; None prefers the plain files.
        tokenizer: instead of the directory's own.

    Raises:
        CheckpointError: another architecture, or a file that is missing, cut short or malformed.
    """
    with refusing(f"cannot read {root}", OSError):
        return _from_directory(root, id, source, variant, tokenizer)


def _from_directory(
    root: Path, id: str, source: str, variant: str | None, tokenizer: Path | None
) -> Checkpoint:
    folders = [*WEIGHT_STEMS, "scheduler", *([] if tokenizer else ["tokenizer"])]
    missing = [folder for folder in folders if not (root / folder).is_dir()]
    if missing:
        raise CheckpointError(
            f"{root} is not a whole diffusers directory",
            got=f"no {', '.join(missing)}",
            expected="the folders unet, vae, text_encoder, tokenizer, scheduler",
        )
    if (root / "text_encoder_2").exists():
        raise CheckpointError(
            f"{root} has two text encoders (SDXL)", expected="Stable Diffusion 1.x or 2.x"
        )
    models = {
        folder: Model(
            config=read_json(root / folder / "config.json"),
            weights=_weights_from_folder(root / folder, variant),
        )
        for folder in WEIGHT_STEMS
    }
    return Checkpoint(
        id=id,
        source=source,
        **models,
        scheduler=read_json(root / "scheduler" / "scheduler_config.json"),
        tokenizer_json=tokenizer_json_for(
            models["text_encoder"], tokenizer if tokenizer else root / "tokenizer"
        ),
    )


def tokenizer_json_for(
    text_encoder: Model, tokenizer: Path, *, pad_token: str | None = None
) -> str:
    """Return the tokenizer at `tokenizer`, cut and padded to what the text encoder takes."""
    length = size_from_config(text_encoder, "max_position_embeddings", 2, MOST_POSITIONS)
    vocab_size = size_from_config(text_encoder, "vocab_size")
    return tokenizer_json_from_path(
        tokenizer, length=length, vocab_size=vocab_size, pad_token=pad_token
    )


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; anything else is a CheckpointError."""
    return json_from_file(file, error=CheckpointError, do=_AGAIN)


def size_from_config(model: Model, key: str, least: int = 1, most: int = MOST) -> int:
    """Return a whole number of a model's config; anything else is a CheckpointError."""
    name = f"{model.weights.name}: config key {key}"
    if key not in model.config:
        raise CheckpointError(f"{model.weights.name}: config.json lacks {key}")
    try:
        return whole_number(name, model.config[key], least, most)
    except InputError as error:
        raise CheckpointError(str(error)) from error


def refuse_pickle(path: Path) -> None:
    """Raise a CheckpointError for a file whose format runs code when it is opened."""
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(
            f"{path} is a pickle",
            expected="safetensors: opening a pickle can run any code",
            do=_SAFE_COPY,
        )


def _weights_from_folder(folder: Path, variant: str | None) -> Weights:
    stem = WEIGHT_STEMS[folder.name]
    for kind in [variant] if variant else [None, "fp16"]:
        dotted = f".{kind}" if kind else ""
        whole = folder / f"{stem}{dotted}.safetensors"
        index = folder / f"{stem}.safetensors.index{dotted}.json"
        if os.path.lexists(whole):
            return Weights(entries_from_safetensors(whole), name=folder.name)
        if os.path.lexists(index):
            return Weights(_entries_from_index(index), name=folder.name)
    there = sorted(file.name for file in folder.iterdir() if file.suffix == ".safetensors")
    for file in sorted(folder.iterdir()):
        if not there:
            refuse_pickle(file)
    raise CheckpointError(
        f"no weights in {folder}",
        got=", ".join(there) if there else "no .safetensors file",
        expected=f"{stem}{f'.{variant}' if variant else ''}.safetensors",
        do="complete the download"
        if not there
        else "give the other files with --variant, or leave it out",
    )


def _entries_from_index(index: Path) -> dict[str, Entry]:
    """Entries of a sharded model, whose index maps every tensor to a file beside it."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} has no weight_map", do=_AGAIN)
    shards: dict[str, dict[str, Entry]] = {}
    if not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index}: weight_map names something that is no file", do=_AGAIN)
    names = sorted(set(places.values()))
    if len(names) > _MOST_SHARDS:
        raise CheckpointError(f"{index} names {len(names)} files", expected=f"to {_MOST_SHARDS}")
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index} names a file outside its folder: {name!r}")
        shards[name] = entries_from_safetensors(index.parent / name)
    entries = {}
    for key, name in places.items():
        if key not in shards[name]:
            raise CheckpointError(
                f"{index} is wrong: {name} lacks tensor {key}", do="download both again"
            )
        entries[key] = shards[name][key]
    return entries
