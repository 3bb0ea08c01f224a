"""A checkpoint's sizes and defaults, checked before gigabytes are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from sld_edge.engines.checks import finite_number, whole_number
from sld_edge.engines.errors import CheckpointError, InputError, printable
from sld_edge.export.checkpoints.checkpoint import (
    PREVIEW_VAE,
    Checkpoint,
    Model,
    is_tiny,
    size_from_config,
)
from sld_edge.export.checkpoints.config import MOST_LEVELS, MOST_POSITIONS
from sld_edge.export.checkpoints.scheduler import sampler_from_scheduler
from sld_edge.export.checkpoints.sources import PREDICTION_TYPES
from sld_edge.export.families.family import Family, Inputs, require_equal
from sld_edge.export.refuse import ODD_VALUES, refusing
from sld_edge.export.settings import ExportSettings
from sld_edge.runtime.manifest import Defaults, LatentInfo, PredictionType, Size
from sld_edge.runtime.samplers import SAMPLERS, sampler_table

Say = Callable[[str], None]
_MOST_CELLS = 4096  # height or width of latents


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A checkpoint's sizes and defaults, resolved."""

    prediction_type: PredictionType
    latents: LatentInfo
    size: Size
    inputs: Inputs
    text_length: int
    scheduler: Mapping[str, Any]
    defaults: Defaults


def shape_of(checkpoint: Checkpoint, family: Family, settings: ExportSettings, say: Say) -> Shape:
    """Return the sizes and defaults of the bundle.

    Raises:
        CheckpointError: models that do not fit together, or a config that no run can use.
        InputError: a picture size that the model cannot make.
    """
    models = checkpoint.models
    latents = _latents(models["vae"])
    require_equal(
        "latent channels",
        {
            "unet": size_from_config(models["unet"], "in_channels"),
            "vae": latents.channels,
        },
    )
    length = require_equal(
        "tokens of a prompt",
        {
            name: size_from_config(models[name], "max_position_embeddings", 2, MOST_POSITIONS)
            for name in checkpoint.tokenizers
        },
    )
    inputs = family.inputs(checkpoint)
    predicts = str(checkpoint.scheduler.get("prediction_type", "epsilon"))  # diffusers' default
    if predicts not in PREDICTION_TYPES:
        raise CheckpointError(
            "scheduler: prediction_type", got=predicts, expected=", ".join(PREDICTION_TYPES)
        )
    if PREVIEW_VAE in models:
        sides = {"vae": latents, "preview vae": _latents(models[PREVIEW_VAE])}
        require_equal("pixels per latent cell", {k: v.downscale for k, v in sides.items()})
        require_equal("latent channels", {k: v.channels for k, v in sides.items()})
    downscale = latents.downscale
    pixels = _pixels(checkpoint, settings, downscale)
    for name, value in pixels.items():
        if value < downscale or value % downscale:
            raise InputError(name, got=value, expected=f"a multiple of {downscale}")
    scheduler = {k: v for k, v in checkpoint.scheduler.items() if not k.startswith("_")}
    if settings.timestep_spacing is not None:
        scheduler["timestep_spacing"] = settings.timestep_spacing
    defaults = _defaults(checkpoint, settings, inputs, say)
    with refusing("scheduler_config.json", *ODD_VALUES):
        _check_scheduler({**scheduler, "prediction_type": predicts}, defaults, say)
    return Shape(
        prediction_type=cast(PredictionType, predicts),
        latents=latents,
        size=Size(**pixels),
        inputs=inputs,
        text_length=length,
        scheduler=scheduler,
        defaults=defaults,
    )


def _latents(vae: Model) -> LatentInfo:
    """Return the facts about latents in a VAE's config."""
    tiny = is_tiny(vae)
    key = "num_decoder_blocks" if tiny else "block_out_channels"
    levels = vae.config.get(key)
    if not isinstance(levels, list) or not 0 < len(levels) <= MOST_LEVELS:
        raise CheckpointError(
            f"vae: config key {key}", got=repr(levels), expected=f"a list, 1 to {MOST_LEVELS}"
        )
    given = vae.config.get("scaling_factor", 1.0 if tiny else 0.18215)  # diffusers' defaults
    try:
        factor = finite_number("vae: config key scaling_factor", given, 1e-6, 1e6)
    except InputError as error:
        raise CheckpointError(str(error)) from error
    return LatentInfo(
        channels=size_from_config(vae, "latent_channels"),
        downscale=2 ** (len(levels) - 1),
        scaling_factor=factor,
    )


def _pixels(checkpoint: Checkpoint, settings: ExportSettings, downscale: int) -> dict[str, int]:
    """Return height and width of a picture, from the settings or else from the training."""
    height, width = settings.height, settings.width
    if height is not None and width is not None:
        return {"height": height, "width": width}
    native = checkpoint.models["unet"].config.get("sample_size", 64)
    cells = native if isinstance(native, list) else [native, native]
    try:
        rows, columns = (whole_number("size", each, 1, _MOST_CELLS) for each in cells)
    except (InputError, ValueError) as error:
        raise CheckpointError(
            "unet: config key sample_size",
            got=repr(native),
            expected=f"one or two whole numbers, 1 to {_MOST_CELLS}",
            do="give width and height",
        ) from error
    return {
        "height": height if height is not None else rows * downscale,
        "width": width if width is not None else columns * downscale,
    }


def _check_scheduler(scheduler: Mapping[str, Any], defaults: Defaults, say: Say) -> None:
    """Refuse a scheduler that no sampler can run; note where only the default sampler cannot."""
    names = (defaults.sampler, *(name for name in SAMPLERS if name != defaults.sampler))
    problems = [_problem(name, scheduler, defaults.steps) for name in names]
    if problems[0] is None:
        return
    if None not in problems:
        raise CheckpointError("scheduler_config.json", got=problems[0])
    say(f"note: {problems[0]}")


def _problem(sampler: str, scheduler: Mapping[str, Any], steps: int) -> str | None:
    try:
        sampler_table(sampler, scheduler, steps)
    except InputError as error:
        return str(error)
    return None


def _defaults(
    checkpoint: Checkpoint, settings: ExportSettings, inputs: Inputs, say: Say
) -> Defaults:
    """Return the defaults of a run; a distilled model needs few steps.

    A UNet with a guidance embedding takes the guidance as an input, 8.5 in diffusers' pipeline;
    other LCMs contain a fixed guidance.
    """
    if settings.sampler is None:
        sampler, notes = sampler_from_scheduler(checkpoint.scheduler)
        for note in notes:
            say(f"note: {printable(note)}")
    else:
        sampler = settings.sampler
    steps, guidance_scale = (4, 1.0) if sampler == "lcm" else (50, 7.5)
    if inputs.guidance == "embedded":
        guidance_scale = 8.5
    return Defaults(
        sampler=sampler,
        steps=settings.steps if settings.steps is not None else steps,
        guidance_scale=settings.guidance_scale
        if settings.guidance_scale is not None
        else guidance_scale,
        safety=settings.preset,
    )
