"""DDIM (arXiv 2010.02502, equations 12 and 16)."""

from __future__ import annotations

import numpy as np

from sld_edge.runtime.contract import HISTORY
from sld_edge.runtime.samplers.config import SchedulerConfig
from sld_edge.runtime.samplers.prediction import clean_from_output, noise_from_output
from sld_edge.runtime.samplers.schedule import (
    alpha_at,
    alphas_cumprod_from_config,
    timesteps_of_points,
)
from sld_edge.runtime.samplers.table import SamplerTable


def ddim_table(name: str, config: SchedulerConfig, steps: int, eta: float) -> SamplerTable:
    """Return the table of DDIM; eta 0 is deterministic, 1 is DDPM."""
    alphas = alphas_cumprod_from_config(config)
    timesteps = timesteps_of_points(config, steps, whole=True)
    a, s = np.zeros(steps), np.zeros(steps)
    b = np.zeros((steps, 1 + HISTORY))
    for i, t in enumerate(timesteps.astype(int)):
        now = alpha_at(alphas, t, config)
        then = alpha_at(alphas, t - config.num_train_timesteps // steps, config)
        s[i] = eta * np.sqrt((1 - then) / (1 - now) * (1 - now / then))
        toward = np.sqrt(1 - then - s[i] ** 2)
        root, noise = np.sqrt(now), np.sqrt(1 - now)
        p_clean, q_clean = clean_from_output(config.prediction_type, root, noise)
        p_noise, q_noise = noise_from_output(config.prediction_type, root, noise)
        a[i] = np.sqrt(then) * p_clean + toward * p_noise
        b[i, 0] = np.sqrt(then) * q_clean + toward * q_noise
    return SamplerTable(
        name=name,
        timesteps=timesteps,
        c_in=np.ones(steps),
        p=np.zeros(steps),
        q=np.ones(steps),
        a=a,
        b=b,
        s=s,
        init_noise_sigma=1.0,
        alpha=np.sqrt([alpha_at(alphas, int(t), config) for t in timesteps]),
        prediction_type=config.prediction_type,
    )
