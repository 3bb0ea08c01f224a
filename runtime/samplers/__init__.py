"""Samplers as tables: the coefficients of each UNet call, computed once in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from sld_edge.engines.errors import InputError
from sld_edge.runtime.samplers.config import SchedulerConfig, config_from_scheduler
from sld_edge.runtime.samplers.ddim import ddim_table
from sld_edge.runtime.samplers.dpmpp import dpmpp_table
from sld_edge.runtime.samplers.euler import euler_ancestral_table, euler_table
from sld_edge.runtime.samplers.lcm import lcm_table
from sld_edge.runtime.samplers.lms import lms_table
from sld_edge.runtime.samplers.pndm import pndm_table
from sld_edge.runtime.samplers.prediction import SafetyUnits
from sld_edge.runtime.samplers.table import SamplerTable
from sld_edge.runtime.samplers.unipc import unipc_table

__all__ = ["SAMPLERS", "SafetyUnits", "SamplerTable", "sampler_table"]


def _dpmpp_karras_table(name: str, config: SchedulerConfig, steps: int) -> SamplerTable:
    return dpmpp_table(name, replace(config, use_karras_sigmas=True), steps)


_TABLES = {
    "pndm": pndm_table,
    "euler": euler_table,
    "euler-a": euler_ancestral_table,
    "dpm++2m": dpmpp_table,
    "dpm++2m-karras": _dpmpp_karras_table,
    "lcm": lcm_table,
    "unipc": unipc_table,
    "lms": lms_table,
}
SAMPLERS = ("ddim", *_TABLES)


def sampler_table(
    name: str,
    scheduler: Mapping[str, Any],
    steps: int,
    *,
    eta: float = 0.0,
    safety_units: SafetyUnits = "noise",
) -> SamplerTable:
    """Return the table of a sampler, with the same steps as diffusers' scheduler of that kind.

    Args:
        name: one of `SAMPLERS`.
        scheduler: a diffusers `scheduler_config.json`. Keys that the sampler does not know are
            ignored; absent keys have the sampler's defaults (`config.READS`).
        steps: from 1 to the training timesteps; pndm makes one UNet call more.
        eta: for ddim, 0 to 1: how much fresh noise a step adds; 0 for other samplers.
        safety_units: see `SamplerTable`.

    Raises:
        InputError: an unknown name, or steps, eta or a configuration that the sampler cannot use.
    """
    if name not in SAMPLERS:
        raise InputError("sampler", got=repr(name), expected=f"one of {', '.join(SAMPLERS)}")
    config = config_from_scheduler(name, scheduler)
    if not 1 <= steps <= config.num_train_timesteps:
        raise InputError("steps", got=steps, expected=f"from 1 to {config.num_train_timesteps}")
    if not 0 <= eta <= (1 if name == "ddim" else 0):
        raise InputError(f"eta for {name}", got=eta, expected="0, or up to 1 for ddim")
    try:
        with np.errstate(all="ignore"):  # a table that is not finite is refused below
            if name == "ddim":
                table = ddim_table(name, config, steps, eta)
            else:
                table = _TABLES[name](name, config, steps)
    except (ArithmeticError, ValueError, IndexError, np.linalg.LinAlgError):
        table = None
    if table is None or not table.finite:
        raise InputError(
            f"{name} with {steps} steps and this scheduler configuration",
            got="numbers that are not finite",
            do="use another number of steps or another sampler",
        )
    return replace(table, safety_units=safety_units)
