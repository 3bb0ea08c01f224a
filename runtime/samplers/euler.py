"""Euler and Euler ancestral, in sigma (arXiv 2206.00364; k-diffusion)."""

from __future__ import annotations

import numpy as np

from sld_edge.runtime.contract import HISTORY
from sld_edge.runtime.samplers.config import SchedulerConfig
from sld_edge.runtime.samplers.prediction import slope_from_output
from sld_edge.runtime.samplers.schedule import (
    first_scale,
    karras_sigmas,
    karras_timesteps,
    last_sigma,
    sigmas_at,
    timesteps_of_points,
    training_sigmas_from_config,
)
from sld_edge.runtime.samplers.table import Floats, SamplerTable


def timesteps_and_sigmas(config: SchedulerConfig, steps: int) -> tuple[Floats, Floats]:
    """Return N timesteps and N + 1 sigmas for the samplers that step in sigma."""
    training = training_sigmas_from_config(config)
    timesteps = timesteps_of_points(config, steps, whole=False)
    sigmas = sigmas_at(timesteps, training)
    if config.use_karras_sigmas:
        ends = (timesteps[0], timesteps[-1])
        sigmas = karras_sigmas(config, sigmas, steps)
        timesteps = karras_timesteps(config, steps, ends=ends)
        timesteps = timesteps.astype(np.float32).astype(np.float64)
    return timesteps, np.append(sigmas, last_sigma(config, training))


def euler_table(name: str, config: SchedulerConfig, steps: int) -> SamplerTable:
    """Return the table of Euler's method; the history has dx/dsigma."""
    timesteps, sigmas = timesteps_and_sigmas(config, steps)
    b = np.zeros((steps, 1 + HISTORY))
    b[:, 0] = np.diff(sigmas)
    return slope_table(name, config, timesteps, sigmas, b, np.zeros(steps))


def euler_ancestral_table(name: str, config: SchedulerConfig, steps: int) -> SamplerTable:
    """Return the table of Euler ancestral: a step below the next sigma, then noise up to it."""
    timesteps, sigmas = timesteps_and_sigmas(config, steps)
    now, then = sigmas[:-1], sigmas[1:]
    up = np.sqrt(then**2 * (now**2 - then**2) / now**2)
    b = np.zeros((steps, 1 + HISTORY))
    b[:, 0] = np.sqrt(then**2 - up**2) - now
    return slope_table(name, config, timesteps, sigmas, b, up)


def slope_table(
    name: str, config: SchedulerConfig, timesteps: Floats, sigmas: Floats, b: Floats, s: Floats
) -> SamplerTable:
    """Return a table whose calls add dx/dsigma times b to x."""
    pairs = [slope_from_output(config.prediction_type, sigma) for sigma in sigmas[:-1]]
    p, q = np.array(pairs).T
    return SamplerTable(
        name=name,
        timesteps=timesteps,
        c_in=1 / np.sqrt(sigmas[:-1] ** 2 + 1),
        p=p,
        q=q,
        a=np.ones(len(timesteps)),
        b=b,
        s=s,
        init_noise_sigma=first_scale(config, sigmas),
        alpha=1 / np.hypot(sigmas[:-1], 1.0),
        prediction_type=config.prediction_type,
    )
