"""DPM-Solver++ 2M (arXiv 2211.01095, algorithm 2), with the training's sigmas or Karras' sigmas."""

from __future__ import annotations

import numpy as np

from sld_edge.engines.errors import InputError
from sld_edge.runtime.contract import HISTORY
from sld_edge.runtime.samplers.config import SchedulerConfig
from sld_edge.runtime.samplers.prediction import clean_from_output
from sld_edge.runtime.samplers.schedule import (
    karras_sigmas,
    karras_timesteps,
    last_sigma,
    sigmas_at,
    timesteps_of_intervals,
    training_sigmas_from_config,
)
from sld_edge.runtime.samplers.table import Floats, SamplerTable

_FEW_CALLS = 15  # diffusers: with fewer calls `lower_order_final` makes the last call first order


def dpmpp_table(name: str, config: SchedulerConfig, steps: int) -> SamplerTable:
    """Return the table of DPM-Solver++ of order 1 or 2; the history has the clean latents.

    Raises:
        InputError: the configuration has another order.
    """
    if config.solver_order not in (1, 2):
        raise InputError(
            f"{name}: solver_order in the scheduler's configuration",
            got=config.solver_order,
            expected="1 or 2",
            do="choose unipc",
        )
    # diffusers rounds Karras' timesteps down for this schedule, and to the nearest for others.
    cut = config.beta_schedule == "squaredcos_cap_v2"
    timesteps, sigmas = timesteps_and_sigmas(config, steps, cut=cut)
    calls = len(timesteps)
    b = np.zeros((calls, 1 + HISTORY))
    first_order_end = (
        config.euler_at_final
        or (config.lower_order_final and calls < _FEW_CALLS)
        or config.final_sigmas_type == "zero"
    )
    for i in range(calls):
        first = config.solver_order == 1 or i == 0 or (i == calls - 1 and first_order_end)
        b[i, 0], b[i, 1] = _weights(config, sigmas, i, second=not first)
    return clean_table(name, config, timesteps, sigmas, b)


def _weights(config: SchedulerConfig, sigmas: Floats, i: int, *, second: bool) -> Floats:
    """Return the factors of the clean latents of calls i and i - 1."""
    now, then = sigmas[i], sigmas[i + 1]
    alpha = 1 / np.hypot(then, 1.0)
    shrink = 1 - then / now  # 1 - exp(-h), h the step in log(1 / sigma)
    if not second:
        return np.array([alpha * shrink, 0.0])
    h = np.log(now / then)
    r = np.log(sigmas[i - 1] / now) / h
    extrapolate = shrink / 2 if config.solver_type != "heun" else 1 - shrink / h
    return np.array([alpha * (shrink + extrapolate / r), -alpha * extrapolate / r])


def timesteps_and_sigmas(
    config: SchedulerConfig, steps: int, *, cut: bool = False
) -> tuple[Floats, Floats]:
    """Return N timesteps and N + 1 sigmas; Karras' timesteps are rounded, down with `cut`."""
    training = training_sigmas_from_config(config)
    if not config.use_karras_sigmas:
        clipped = np.searchsorted(-np.log(training[::-1]), config.lambda_min_clipped)
        timesteps = timesteps_of_intervals(config, steps, len(training) - int(clipped))
        sigmas = sigmas_at(timesteps, training)
    else:
        sigmas = karras_sigmas(config, training[::-1], steps)
        timesteps = karras_timesteps(config, steps)
        timesteps = np.floor(timesteps) if cut else np.round(timesteps)
    return timesteps, np.append(sigmas, last_sigma(config, training))


def clean_table(
    name: str, config: SchedulerConfig, timesteps: Floats, sigmas: Floats, b: Floats
) -> SamplerTable:
    """Return a table whose calls scale x by the ratio of noise and add clean latents times b."""
    alphas = 1 / np.hypot(sigmas, 1.0)
    noise = sigmas * alphas
    pairs = [
        clean_from_output(config.prediction_type, alphas[i], noise[i])
        for i in range(len(timesteps))
    ]
    p, q = np.array(pairs).T
    return SamplerTable(
        name=name,
        timesteps=timesteps,
        c_in=np.ones(len(timesteps)),
        p=p,
        q=q,
        a=noise[1:] / noise[:-1],
        b=b,
        s=np.zeros(len(timesteps)),
        init_noise_sigma=1.0,
        alpha=alphas[:-1],
        prediction_type=config.prediction_type,
    )
