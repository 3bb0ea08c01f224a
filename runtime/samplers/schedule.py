"""Noise schedules in float64: alphas, timesteps and sigmas, as in diffusers' schedulers.

sigma is the ratio of noise to signal, as in Karras et al. (arXiv 2206.00364): sqrt((1 - A) / A),
where A is `alphas_cumprod`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sld_edge.engines.errors import InputError
from sld_edge.runtime.samplers.config import SchedulerConfig
from sld_edge.runtime.samplers.table import Floats

Linspace = Callable[[float, float, int], Floats]

_RHO = 7.0  # Karras et al., equation 5
_LEAST_ALPHA = 2.0**-24  # in place of 0, so that the first sigma is finite; diffusers' number


def alphas_cumprod_from_config(config: SchedulerConfig) -> Floats:
    """Return the share of signal in the variance at each training timestep, from high to low.

    With `rescale_betas_zero_snr` the last is exactly 0 (arXiv 2305.08891, algorithm 1).

    Raises:
        InputError: betas that are not between 0 and 1, or not one for each timestep.
    """
    betas = _betas(config)
    if len(betas) != config.num_train_timesteps or not ((betas > 0) & (betas < 1)).all():
        raise InputError(
            "betas of the scheduler's configuration",
            got=f"{len(betas)} from {betas.min(initial=1)} to {betas.max(initial=0)}",
            expected=f"{config.num_train_timesteps} between 0 and 1",
        )
    alphas = np.cumprod(1 - betas, dtype=np.float64)
    if config.rescale_betas_zero_snr:
        root = np.sqrt(alphas)
        alphas = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return alphas


def _betas(config: SchedulerConfig, linspace: Linspace = np.linspace) -> Floats:
    count = config.num_train_timesteps
    if config.trained_betas is not None:
        return np.array(config.trained_betas, np.float64)
    if config.beta_schedule == "linear":
        return linspace(config.beta_start, config.beta_end, count)
    if config.beta_schedule == "scaled_linear":
        return linspace(np.sqrt(config.beta_start), np.sqrt(config.beta_end), count) ** 2
    # squaredcos_cap_v2 (arXiv 2102.09672, equation 17)
    angle = (np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2
    alpha_bar = np.cos(angle) ** 2
    betas: Floats = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    return betas


def alpha_at(alphas: Floats, timestep: int, config: SchedulerConfig) -> float:
    """Return the alpha of a timestep; a timestep below 0 is clean, as `set_alpha_to_one` says.

    Raises:
        InputError: a timestep after the last training timestep.
    """
    if timestep < 0:
        return 1.0 if config.set_alpha_to_one else float(alphas[0])
    if timestep >= len(alphas):
        raise InputError(
            "steps and steps_offset reach a timestep",
            got=timestep,
            expected=f"at most {len(alphas) - 1}",
            do="use fewer steps",
        )
    return float(alphas[timestep])


def timesteps_of_points(config: SchedulerConfig, steps: int, *, whole: bool) -> Floats:
    """Return `steps` timesteps from high to low; linspace includes both ends of training.

    With `whole`, linspace's timesteps are rounded; else they are fractions, exact in float32.
    """
    count = config.num_train_timesteps
    if config.timestep_spacing == "linspace":
        points = np.linspace(0, count - 1, steps)[::-1]
        return (np.round(points) if whole else points.astype(np.float32)).astype(np.float64)
    if config.timestep_spacing == "leading":
        return np.arange(steps)[::-1] * (count // steps) + np.float64(config.steps_offset)
    return _trailing(count, count, steps)


def timesteps_of_intervals(config: SchedulerConfig, steps: int, end: int) -> Floats:
    """Return the upper ends of `steps` intervals below timestep `end`, from high to low."""
    if config.timestep_spacing == "linspace":
        return np.linspace(0.0, end - 1, steps + 1).round()[:0:-1]
    if config.timestep_spacing == "leading":
        return np.arange(1, steps + 1)[::-1] * (end // (steps + 1)) + np.float64(
            config.steps_offset
        )
    return _trailing(config.num_train_timesteps, end, steps)


def _trailing(count: int, end: int, steps: int) -> Floats:
    # By rounding, arange gives a timestep too many for some step counts (61, 103, ...): diffusers
    # then makes a call at timestep -1. This call is left out here.
    return np.round(np.arange(end, 0, -count / steps))[:steps] - 1


def training_sigmas_from_config(config: SchedulerConfig) -> Floats:
    """Return sigma at each training timestep, from low to high; the last is always finite."""
    alphas = alphas_cumprod_from_config(config)
    if config.rescale_betas_zero_snr:
        alphas[-1] = _LEAST_ALPHA
    return np.sqrt((1 - alphas) / alphas)


def sigmas_at(timesteps: Floats, training: Floats) -> Floats:
    """Interpolate sigma at timesteps, also fractions, between the training timesteps."""
    return np.interp(timesteps, np.arange(len(training)), training)


def karras_sigmas(config: SchedulerConfig, ends: Floats, steps: int) -> Floats:
    """Return the sigmas of Karras et al., equation 5, without the final 0.

    The first and last of `ends` are used if the configuration has no highest and lowest sigma.
    """
    highest = config.sigma_max if config.sigma_max is not None else ends[0]
    lowest = config.sigma_min if config.sigma_min is not None else ends[-1]
    high, low = highest ** (1 / _RHO), lowest ** (1 / _RHO)
    return np.asarray((high + np.linspace(0, 1, steps) * (low - high)) ** _RHO)


def karras_timesteps(
    config: SchedulerConfig, steps: int, *, ends: tuple[float, float] | None = None
) -> Floats:
    """Return the timestep of each of Karras' sigmas, interpolated in log(sigma).

    `ends` are the timesteps of the highest and lowest sigma if the configuration has no `sigma_max`
    and `sigma_min`; None is the first and last of training. diffusers computes these timesteps from
    float32 tables and then rounds them, so the same tables are used here.
    """
    training = _training_sigmas_float32(config)
    high, low = ends if ends is not None else (len(training) - 1, 0)
    sigmas = karras_sigmas(config, sigmas_at(np.array([high, low]), training), steps)
    return np.interp(np.log(sigmas), np.log(training.astype(np.float32)), np.arange(len(training)))


def _training_sigmas_float32(config: SchedulerConfig) -> Floats:
    """Return `training_sigmas_from_config` rounded to float32 at every stage, as in torch."""
    if config.rescale_betas_zero_snr:
        return training_sigmas_from_config(config).astype(np.float32).astype(np.float64)
    betas = _betas(config, _linspace_float32).astype(np.float32)
    alphas = np.cumprod(1 - betas, dtype=np.float64).astype(np.float32)
    sigmas: Floats = np.sqrt((1 - alphas) / alphas).astype(np.float64)
    return sigmas


def _linspace_float32(start: float, end: float, count: int) -> NDArray[Any]:
    """Return the numbers of torch.linspace: computed from both ends, with a rounded step."""
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(count - 1))
    index = np.arange(count)
    rising, falling = first + step * index, last - step * index[::-1]
    return np.where(index < count // 2, rising, falling).astype(np.float32)


def last_sigma(config: SchedulerConfig, training: Floats) -> float:
    """Return the sigma after the last call."""
    return 0.0 if config.final_sigmas_type == "zero" else float(training[0])


def first_scale(config: SchedulerConfig, sigmas: Floats) -> float:
    """Return the standard deviation of the first latents for samplers that step in sigma."""
    largest = float(sigmas.max())
    if config.timestep_spacing == "leading":
        return math.hypot(largest, 1.0)
    return largest
