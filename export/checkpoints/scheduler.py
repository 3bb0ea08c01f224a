"""The sampler of a checkpoint, from its scheduler_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sld_edge.engines.errors import CheckpointError

_SAMPLERS = {
    "PNDMScheduler": "pndm",
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-a",
    "DPMSolverMultistepScheduler": "dpm++2m",
    "LCMScheduler": "lcm",
    "UniPCMultistepScheduler": "unipc",
    "LMSDiscreteScheduler": "lms",
}
_FALLBACK = "pndm"


def sampler_from_scheduler(scheduler: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the sampler's name, and notes where it differs from the checkpoint's scheduler.

    Raises:
        CheckpointError: a scheduler without a sampler in sld-edge.
    """
    kind = scheduler.get("_class_name")
    if kind is None:
        return _FALLBACK, [f"the scheduler has no name; runs use {_FALLBACK} by default"]
    name = _SAMPLERS.get(str(kind))
    if name is None:
        raise CheckpointError(
            "sld-edge has no sampler for the checkpoint's scheduler; another makes other pictures",
            got=kind,
            expected=", ".join(_SAMPLERS),
            do="choose the bundle's sampler with --sampler NAME",
        )
    notes = []
    if scheduler.get("use_karras_sigmas"):
        if name == "dpm++2m":
            name = "dpm++2m-karras"
        else:
            notes.append(f"the scheduler's Karras sigmas are not used with {name}")
    algorithm = scheduler.get("algorithm_type", "dpmsolver++")
    if name.startswith("dpm++2m") and algorithm != "dpmsolver++":
        notes.append(f"the scheduler's algorithm {algorithm} is replaced by dpmsolver++")
    return name, notes
