"""PNDM without its Runge-Kutta start (arXiv 2202.09778), which is PLMS.

Two calls have the second timestep. Call 0 is a trial step; call 1 starts again from the first
latents, which it computes back from the result of the trial. So there is one call more than steps.
The output of call 1 is used in that call only.
"""

from __future__ import annotations

import numpy as np

from sld_edge.runtime.contract import HISTORY
from sld_edge.runtime.samplers.config import SchedulerConfig
from sld_edge.runtime.samplers.prediction import noise_from_output
from sld_edge.runtime.samplers.schedule import (
    alpha_at,
    alphas_cumprod_from_config,
    timesteps_of_points,
)
from sld_edge.runtime.samplers.table import Floats, SamplerTable

# Adams-Bashforth weights of outputs i, i-1, ... by call; the weight of call 1 is 0 after it.
_WEIGHTS = {
    0: (1.0, 0.0, 0.0, 0.0, 0.0),
    1: (1 / 2, 1 / 2, 0.0, 0.0, 0.0),
    2: (3 / 2, 0.0, -1 / 2, 0.0, 0.0),
    3: (23 / 12, -16 / 12, 0.0, 5 / 12, 0.0),
    4: (55 / 24, -59 / 24, 37 / 24, 0.0, -9 / 24),
}
_WEIGHTS_AFTER = (55 / 24, -59 / 24, 37 / 24, -9 / 24, 0.0)


def pndm_table(name: str, config: SchedulerConfig, steps: int) -> SamplerTable:
    """Return the table of PNDM: steps + 1 calls, or 1 call for 1 step.

    For v, the outputs are averaged and the average is converted to noise, as in diffusers. For
    "sample", which diffusers refuses here, each output is converted to noise in its call.
    """
    alphas = alphas_cumprod_from_config(config)
    timesteps = timesteps_of_points(config, steps, whole=True)
    timesteps = np.concatenate([timesteps[:2], timesteps[1:]])
    calls = len(timesteps)
    p, q, a = np.zeros(calls), np.ones(calls), np.zeros(calls)
    b = np.zeros((calls, 1 + HISTORY))
    stride = config.num_train_timesteps // steps
    for i, t in enumerate(timesteps.astype(int)):
        start = t + stride if i == 1 else t
        now = alpha_at(alphas, start, config)
        if config.prediction_type == "sample":
            alpha = alpha_at(alphas, t, config)
            p[i], q[i] = noise_from_output("sample", np.sqrt(alpha), np.sqrt(1 - alpha))
        a[i], slope = _transfer(config, now, alpha_at(alphas, start - stride, config))
        b[i] = slope * np.array(_WEIGHTS.get(i, _WEIGHTS_AFTER))
        if i == 1:
            a[i], b[i] = _from_first_latents(a, b)
    return SamplerTable(
        name=name,
        timesteps=timesteps,
        c_in=np.ones(calls),
        p=p,
        q=q,
        a=a,
        b=b,
        s=np.zeros(calls),
        init_noise_sigma=1.0,
        alpha=np.sqrt([alpha_at(alphas, int(t), config) for t in timesteps]),
        prediction_type=config.prediction_type,
    )


def _transfer(config: SchedulerConfig, now: float, then: float) -> tuple[float, float]:
    """Return the factors of x and of the averaged output (equation 9)."""
    scale = np.sqrt(then / now)
    slope = -(then - now) / (now * np.sqrt(1 - then) + np.sqrt(now * (1 - now) * then))
    if config.prediction_type != "v_prediction":
        return scale, slope
    p, q = noise_from_output("v_prediction", np.sqrt(now), np.sqrt(1 - now))
    return scale + slope * p, slope * q


def _from_first_latents(a: Floats, b: Floats) -> tuple[float, Floats]:
    """Convert the row of call 1 from the first latents to the latents after call 0."""
    ratio = a[1] / a[0]
    row = b[1].copy()
    row[1] -= ratio * b[0, 0]
    return ratio, row
