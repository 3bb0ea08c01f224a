"""Linear multistep, order 4, in sigma (k-diffusion)."""

from __future__ import annotations

import numpy as np

from sld_edge.runtime.contract import HISTORY
from sld_edge.runtime.samplers.config import SchedulerConfig
from sld_edge.runtime.samplers.euler import slope_table, timesteps_and_sigmas
from sld_edge.runtime.samplers.table import Floats, SamplerTable

_ORDER = 4
_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(_ORDER)  # exact to degree 7


def lms_table(name: str, config: SchedulerConfig, steps: int) -> SamplerTable:
    """Return the table of LMS: a polynomial through the last dx/dsigma, which the history has."""
    timesteps, sigmas = timesteps_and_sigmas(config, steps)
    b = np.zeros((steps, 1 + HISTORY))
    for i in range(steps):
        order = min(i + 1, _ORDER)
        known = sigmas[i::-1][:order]
        b[i, :order] = [_integral(known, j, sigmas[i], sigmas[i + 1]) for j in range(order)]
    return slope_table(name, config, timesteps, sigmas, b, np.zeros(steps))


def _integral(known: Floats, j: int, start: float, end: float) -> float:
    """Integrate the polynomial that is 1 at the j-th known sigma and 0 at every other."""
    points = start + (end - start) * (_NODES + 1) / 2
    roots = np.delete(known, j)
    basis = np.prod((points[:, None] - roots) / (known[j] - roots), axis=1)
    return float(basis @ _NODE_WEIGHTS * (end - start) / 2)
