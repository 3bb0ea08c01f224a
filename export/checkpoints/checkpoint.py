"""A checkpoint: its models' configs and tensors, scheduler and tokenizers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sld_edge.engines.checks import whole_number
from sld_edge.engines.errors import CheckpointError, InputError
from sld_edge.engines.files import json_from_file
from sld_edge.export.checkpoints.config import MOST, MOST_POSITIONS
from sld_edge.export.checkpoints.tokenizer import tokenizer_json_from_path
from sld_edge.export.checkpoints.weights import Entry, Weights, entries_from_safetensors
from sld_edge.export.refuse import refusing

# Folder of a diffusers directory -> stem of its weight files.
WEIGHT_STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
REQUIRED = ("unet", "vae", "text_encoder")
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
INDEX = "model_index.json"
PREVIEW_VAE = "preview_vae"  # not in a checkpoint; an option adds it
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_MOST_SHARDS = 100
_AGAIN = "download it again"
_SAFE_COPY = "make a safe copy with diffusers: save_pretrained(DIR, safe_serialization=True)"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model: its config in the form of diffusers or transformers, and its tensors."""

    config: dict[str, Any]
    weights: Weights


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The models and files that a bundle is made from.

    Attributes:
        id: the user's name for it.
        source: `diffusers-directory`, `hub:<id>@<revision>` or `ldm-file`.
        models: by the folder's name in a diffusers directory.
        tokenizers: tokenizer.json's text, by text encoder.
        scheduler: the content of scheduler_config.json.
        index: the content of model_index.json, where there is one.
    """

    id: str
    source: str
    models: Mapping[str, Model]
    tokenizers: Mapping[str, str]
    scheduler: dict[str, Any]
    index: Mapping[str, Any] = field(default_factory=dict)


def checkpoint_from_directory(
    root: Path,
    *,
    id: str,
    source: str = "diffusers-directory",
    variant: str | None = None,
    tokenizer: Path | None = None,
    vae: Path | None = None,
) -> Checkpoint:
    """Open a diffusers directory; tensors stay on disk until a graph reads them.

    Args:
        root: the directory, with folders unet, vae, text_encoder, scheduler and tokenizer, and for
            SDXL text_encoder_2 and tokenizer_2.
        id: the user's name for it.
        source: see Checkpoint.
        variant: "fp16" reads `*.fp16.safetensors`; None prefers the plain files.
        tokenizer: another tokenizer, instead of the directory's.
        vae: the folder of another VAE, instead of the directory's.

    Raises:
        CheckpointError: another architecture, or a file that is missing, cut short or malformed.
    """
    with refusing(f"cannot read {root}", OSError):
        folders = {name: root / name for name in WEIGHT_STEMS if (root / name).is_dir()}
        if vae is not None:
            folders["vae"] = vae
        encoders = [name for name in TOKENIZERS if name in folders]
        wanted = [*REQUIRED, "scheduler", *([] if tokenizer else [TOKENIZERS[e] for e in encoders])]
        missing = [name for name in wanted if name not in folders and not (root / name).is_dir()]
        if missing:
            raise CheckpointError(
                f"{root} is not a whole diffusers directory",
                got=f"no {', '.join(missing)}",
                expected="the folders unet, vae, text_encoder, tokenizer, scheduler",
            )
        models = {
            name: model_from_folder(folder, name, variant) for name, folder in folders.items()
        }
        index = root / INDEX
        return Checkpoint(
            id=id,
            source=source,
            models=models,
            tokenizers={
                name: tokenizer_json_for(
                    models[name], tokenizer if tokenizer else root / TOKENIZERS[name]
                )
                for name in encoders
            },
            scheduler=read_json(root / "scheduler" / "scheduler_config.json"),
            index=read_json(index) if os.path.lexists(index) else {},
        )


def model_from_folder(folder: Path, name: str, variant: str | None = None) -> Model:
    """Open the folder of a diffusers directory that holds the model `name`.

    Raises:
        CheckpointError: a file that is missing, cut short or malformed.
    """
    return Model(
        config=read_json(folder / "config.json"),
        weights=_weights_from_folder(folder, name, variant),
    )


def tokenizer_json_for(
    text_encoder: Model, tokenizer: Path, *, pad_token: str | None = None
) -> str:
    """Return the tokenizer at `tokenizer`; it cuts and pads prompts for the text encoder."""
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


def is_tiny(vae: Model) -> bool:
    """Whether a VAE is diffusers' AutoencoderTiny, whose config has other keys."""
    return vae.config.get("_class_name") == "AutoencoderTiny"


def refuse_pickle(path: Path) -> None:
    """Raise a CheckpointError for a file whose format runs code when it is opened."""
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(
            f"{path} is a pickle",
            expected="safetensors: opening a pickle can run any code",
            do=_SAFE_COPY,
        )


def _weights_from_folder(folder: Path, name: str, variant: str | None) -> Weights:
    stem = WEIGHT_STEMS[name]
    for kind in [variant] if variant else [None, "fp16"]:
        dotted = f".{kind}" if kind else ""
        whole = folder / f"{stem}{dotted}.safetensors"
        index = folder / f"{stem}.safetensors.index{dotted}.json"
        if os.path.lexists(whole):
            return Weights(entries_from_safetensors(whole), name=name)
        if os.path.lexists(index):
            return Weights(_entries_from_index(index), name=name)
    others = sorted(file.name for file in folder.iterdir() if file.suffix == ".safetensors")
    for file in sorted(folder.iterdir()):
        if not others:
            refuse_pickle(file)
    raise CheckpointError(
        f"no weights in {folder}",
        got=", ".join(others) if others else "no .safetensors file",
        expected=f"{stem}{f'.{variant}' if variant else ''}.safetensors",
        do="complete the download; where there are only pickles, " + _SAFE_COPY
        if not others
        else "give the other files with --variant, or leave it out",
    )


def _entries_from_index(index: Path) -> dict[str, Entry]:
    """Return the entries of a model in several files, whose index names each tensor's file."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index} has no weight_map", do=_AGAIN)
    if not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index}: weight_map must map tensors to file names", do=_AGAIN)
    names = sorted(set(places.values()))
    if len(names) > _MOST_SHARDS:
        raise CheckpointError(f"{index} names {len(names)} files", expected=f"up to {_MOST_SHARDS}")
    shards: dict[str, dict[str, Entry]] = {}
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
