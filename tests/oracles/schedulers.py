"""diffusers' schedulers, run in float64.

They compute their tables, and some of them the latents, in float32. Inside `in_float64` their
modules see a numpy and a torch whose float32 is float64, so that the maths can be compared far
below float32's rounding. Nothing else of them is changed.
"""

from __future__ import annotations

import importlib
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

CLASSES = {
    "ddim": "ddim.DDIMScheduler",
    "pndm": "pndm.PNDMScheduler",
    "euler": "euler_discrete.EulerDiscreteScheduler",
    "euler-a": "euler_ancestral_discrete.EulerAncestralDiscreteScheduler",
    "dpm++2m": "dpmsolver_multistep.DPMSolverMultistepScheduler",
    "dpm++2m-karras": "dpmsolver_multistep.DPMSolverMultistepScheduler",
    "lcm": "lcm.LCMScheduler",
    "unipc": "unipc_multistep.UniPCMultistepScheduler",
    "lms": "lms_discrete.LMSDiscreteScheduler",
}


class _Wide:
    """A module whose float32 is float64."""

    def __init__(self, module: types.ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, "float64" if name == "float32" else name)


class _WideNumpy(_Wide):
    def linspace(self, *args: Any, dtype: Any = None, **kwargs: Any) -> Any:
        # Fractional timesteps are float32 in diffusers, and the UNet is given them as such.
        exact = np.float32 if dtype is np.float64 else dtype
        return np.linspace(*args, dtype=exact, **kwargs).astype(dtype or np.float64)


def _quad(function: Any, start: Any, end: Any, **_: Any) -> tuple[float]:
    nodes, weights = np.polynomial.legendre.leggauss(8)  # exact: only cubics are integrated
    start, end = float(start), float(end)
    points = start + (end - start) * (nodes + 1) / 2
    values = [float(function(point)) for point in points]
    return (float(np.dot(weights, values)) * (end - start) / 2,)


def scheduler_module(name: str) -> types.ModuleType:
    """Import the module of a sampler's scheduler; LMS' needs one function of SciPy, given here."""
    path = f"diffusers.schedulers.scheduling_{CLASSES[name].split('.')[0]}"
    module = importlib.import_module(path)
    if name == "lms":
        vars(module).setdefault("integrate", types.SimpleNamespace(quad=_quad))
    return module


def scheduler_from_config(name: str, config: dict[str, Any]) -> Any:
    """Make the scheduler as `XScheduler.from_config(pipe.scheduler.config)` does."""
    cls = getattr(scheduler_module(name), CLASSES[name].split(".")[1])
    if name == "dpm++2m-karras":
        return cls.from_config(config, use_karras_sigmas=True)
    return cls.from_config(config)


@contextmanager
def in_float64(name: str) -> Iterator[None]:
    """Let a sampler's scheduler compute in float64."""
    before = torch.get_default_dtype()
    module = scheduler_module(name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "np", _WideNumpy(np))
        patch.setattr(module, "torch", _Wide(torch))
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def step(
    name: str, scheduler: Any, output: Any, timestep: Any, latents: Any, noise: Any, eta: float
) -> Any:
    """Take one step with the noise given."""
    extra: dict[str, Any] = {}
    module = scheduler_module(name)
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(module, "randn_tensor"):
            patch.setattr(module, "randn_tensor", lambda *_, **__: noise)
        if name == "ddim":
            extra = {"eta": eta}
        return scheduler.step(output, timestep, latents, return_dict=False, **extra)[0]
