"""The miniature's twin of few steps: a latent consistency model with the miniature's other parts.

Of the twin's UNet only the change from the miniature's weights is kept, in 8 bits: 4.4 MB. Made by
`training/train_few_steps.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sld_edge.engines.errors import MissingPackageError, OutputError

CHECKPOINT: Final = Path(__file__).parent / "checkpoint"
CHANGE: Final = Path(__file__).parent / "few_steps.safetensors"
CONDITION_WIDTH: Final = 64
"""Numbers that the guidance scale is embedded in."""
SCHEDULER: Final[Mapping[str, Any]] = {
    "_class_name": "LCMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "original_inference_steps": 25,
    "timestep_scaling": 10.0,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "prediction_type": "epsilon",
    "clip_sample": False,
}
_INDEX: Final = {
    "_class_name": "LatentConsistencyModelPipeline",
    "scheduler": ["diffusers", "LCMScheduler"],
}
_UNET: Final = Path("unet", "diffusion_pytorch_model.safetensors")
_SCALE: Final = ".scale"
Arrays = dict[str, NDArray[Any]]


def write_change(path: Path, weights: Arrays) -> None:
    """Write the change from the miniature's weights: matrices in 8 bits, one scale a row."""
    _, save = _safetensors()
    source = _source()
    kept: Arrays = {}
    for name, weight in weights.items():
        change = weight.astype(np.float32)
        if name in source:
            change = change - source[name].astype(np.float32)
        if change.ndim < 2 or name not in source:
            kept[name] = change.astype(np.float16)
            continue
        rows = change.reshape(len(change), -1)
        scale = np.abs(rows).max(axis=1) / 127 + 1e-12
        eight = np.round(rows / scale[:, None]).astype(np.int8)
        kept[name], kept[name + _SCALE] = eight.reshape(change.shape), scale.astype(np.float32)
    save(kept, path)


def weights_from_change(path: Path) -> Arrays:
    """Return the twin's weights, FP16, from the miniature's and their change."""
    load, _ = _safetensors()
    change, source = load(path), _source()
    weights: Arrays = {}
    for name, part in change.items():
        if name.endswith(_SCALE):
            continue
        value = part.astype(np.float32)
        if name + _SCALE in change:
            scale = change[name + _SCALE]
            value = value * scale.reshape(-1, *[1] * (value.ndim - 1))
        if name in source:
            value = value + source[name].astype(np.float32)
        weights[name] = value.astype(np.float16)
    return weights


def write_checkpoint(folder: Path, change: Path = CHANGE) -> None:
    """Write the twin as a diffusers folder.

    Raises:
        OutputError: this installation has no weights of the twin; only a clone has them.
    """
    if not change.exists() or not CHECKPOINT.exists():
        raise OutputError(
            "the twin of few steps is not in this installation",
            do="run from a clone of the repository, installed with pip install -e .",
        )
    _, save = _safetensors()
    shutil.copytree(CHECKPOINT, folder, dirs_exist_ok=True)
    save(weights_from_change(change), folder / _UNET)
    for file, changes in (
        ("model_index.json", _INDEX),
        ("unet/config.json", {"time_cond_proj_dim": CONDITION_WIDTH}),
    ):
        settings = {**json.loads((folder / file).read_text()), **changes}
        (folder / file).write_text(json.dumps(settings, indent=1))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=1))


def _source() -> Arrays:
    load, _ = _safetensors()
    weights: Arrays = load(CHECKPOINT / _UNET)
    return weights


def _safetensors() -> tuple[Any, Any]:
    """Return the functions that read and write a file."""
    try:
        from safetensors.numpy import load_file, save_file
    except ImportError as error:
        raise MissingPackageError("safetensors", extra="export", why="the twin") from error
    return load_file, save_file
