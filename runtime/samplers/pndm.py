"""PNDM without its Runge-Kutta start (arXiv 2202.09778), which is PLMS.

The second timestep is called twice: the first call only probes, and the second starts anew from the
first latents, which are recovered from the probe's. So there is one call more than steps, and the
probe's output (j = 1 to 3 in the next rows) is never used again.
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

# Adams-Bashforth weights of outputs i, i-1, ... by call; the outer gap is call 1, left out.
_WEIGHTS = {
    0: (1.0, 0.0, 0.0, 0.0, 0.0),
    1: (1 / 2, 1 / 2, 0.0, 0.0, 0.0),
    2: (3 / 2, 0.0, -1 / 2, 0.0, 0.0),
    3: (23 / 12, -16 / 12, 0.0, 5 / 12, 0.0),
    4: (55 / 24, -59 / 24, 37 / 24, 0.0, -9 / 24),
}
_WEIGHTS_AFTER = (55 / 24, -59 / 24, 37 / 24, -9 / 24, 0.0)


def pndm_table(name: str, config: SchedulerConfig, steps: int) -> SamplerTable:
    """Tabulate PNDM, steps + 1 calls (1 for 1 step).

    The outputs are averaged as they are and only then turned into noise, as diffusers does for v;
    for "sample", which diffusers refuses here, each is turned into noise at its own call.
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
            own = alpha_at(alphas, t, config)
            p[i], q[i] = noise_from_output("sample", np.sqrt(own), np.sqrt(1 - own))
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
    """Give what multiplies x and the averaged output (equation 9)."""
    scale = np.sqrt(then / now)
    slope = -(then - now) / (now * np.sqrt(1 - then) + np.sqrt(now * (1 - now) * then))
    if config.prediction_type != "v_prediction":
        return scale, slope
    p, q = noise_from_output("v_prediction", np.sqrt(now), np.sqrt(1 - now))
    return scale + slope * p, slope * q


def _from_first_latents(a: Floats, b: Floats) -> tuple[float, Floats]:
    """Rewrite call 1, given from the first latents, for the latents that call 0 left."""
    ratio = a[1] / a[0]
    row = b[1].copy()
    row[1] -= ratio * b[0, 0]
    return ratio, row
