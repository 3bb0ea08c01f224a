"""A Stable Diffusion checkpoint: three models' configs and tensors, scheduler and tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sld_edge.engines.errors import CheckpointError
from sld_edge.export.tokenizer import tokenizer_json_from_path
from sld_edge.export.weights import Entry, Weights, entries_from_safetensors

# Folder of a diffusers directory -> how its weight files are called.
WEIGHT_STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
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
    try:
        length = int(text_encoder.config["max_position_embeddings"])
        vocab_size = int(text_encoder.config["vocab_size"])
    except KeyError as error:
        raise CheckpointError(f"text_encoder: config.json lacks {error}") from error
    return tokenizer_json_from_path(
        tokenizer, length=length, vocab_size=vocab_size, pad_token=pad_token
    )


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; anything else is a CheckpointError."""
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {file}", got=error.strerror, do="complete the download"
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"{file} is not whole JSON", got=error, do="download it again"
        ) from error
    if not isinstance(body, dict):
        raise CheckpointError(f"{file}", got=type(body).__name__, expected="a JSON object")
    return body


def refuse_pickle(path: Path) -> None:
    """Raise a CheckpointError for a file whose format runs code when it is opened."""
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(
            f"{path} is a pickle, which can run any code",
            expected="safetensors",
            do=_SAFE_COPY,
        )


def _weights_from_folder(folder: Path, variant: str | None) -> Weights:
    stem = WEIGHT_STEMS[folder.name]
    for kind in [variant] if variant else [None, "fp16"]:
        dotted = f".{kind}" if kind else ""
        whole = folder / f"{stem}{dotted}.safetensors"
        index = folder / f"{stem}.safetensors.index{dotted}.json"
        if whole.is_file():
            return Weights(entries_from_safetensors(whole), name=folder.name)
        if index.is_file():
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
        raise CheckpointError(f"{index} has no weight_map", do="download it again")
    shards: dict[str, dict[str, Entry]] = {}
    for name in sorted(set(map(str, places.values()))):
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
