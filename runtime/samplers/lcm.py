"""Latent consistency sampling (arXiv 2310.04378), for UNets without an input for guidance."""

from __future__ import annotations

import numpy as np

from sld_edge.engines.errors import InputError
from sld_edge.runtime.contract import HISTORY
from sld_edge.runtime.samplers.config import SchedulerConfig
from sld_edge.runtime.samplers.prediction import clean_from_output
from sld_edge.runtime.samplers.schedule import alpha_at, alphas_cumprod_from_config
from sld_edge.runtime.samplers.table import SamplerTable

_SIGMA_DATA = 0.5


def lcm_table(name: str, config: SchedulerConfig, steps: int) -> SamplerTable:
    """Return the table of LCM: a call goes to the clean latents, then adds noise for the next call.

    Raises:
        InputError: more steps than those of the model's distillation.
    """
    distilled = config.original_inference_steps
    if not steps <= distilled <= config.num_train_timesteps:
        raise InputError(
            "steps for lcm",
            got=steps,
            expected=f"at most {min(distilled, config.num_train_timesteps)}",
        )
    alphas = alphas_cumprod_from_config(config)
    stride = config.num_train_timesteps // distilled
    schedule = np.arange(distilled, 0, -1) * stride - 1
    timesteps = schedule[np.floor(np.linspace(0, distilled, steps, endpoint=False)).astype(int)]
    a, s = np.zeros(steps), np.zeros(steps)
    b = np.zeros((steps, 1 + HISTORY))
    for i, t in enumerate(timesteps):
        now = alpha_at(alphas, t, config)
        then = alpha_at(alphas, timesteps[i + 1], config) if i + 1 < steps else 1.0
        p, q = clean_from_output(config.prediction_type, np.sqrt(now), np.sqrt(1 - now))
        scaled = t * config.timestep_scaling
        skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
        out = scaled / np.hypot(scaled, _SIGMA_DATA)
        a[i] = np.sqrt(then) * (out * p + skip)
        b[i, 0] = np.sqrt(then) * out * q
        s[i] = np.sqrt(1 - then)
    return SamplerTable(
        name=name,
        timesteps=timesteps.astype(np.float64),
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
