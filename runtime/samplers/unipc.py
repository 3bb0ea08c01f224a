"""UniPC (arXiv 2302.04867), B1 and B2, of order 1 to 3, on the clean latents.

A call first corrects the latents that the call before it predicted, then predicts the next latents.
Correction and prediction multiply the same corrected latents by the same factor. So the correction
adds only a weighted sum of the history: row i is this sum, times a, plus the prediction.
"""

from __future__ import annotations

import numpy as np

from sld_edge.engines.errors import InputError
from sld_edge.runtime.contract import HISTORY
from sld_edge.runtime.samplers.config import SchedulerConfig
from sld_edge.runtime.samplers.dpmpp import clean_table, timesteps_and_sigmas
from sld_edge.runtime.samplers.table import Floats, SamplerTable

_ORDERS = (1, 2, 3)


def unipc_table(name: str, config: SchedulerConfig, steps: int) -> SamplerTable:
    """Return the table of UniPC; the history has the clean latents before their correction.

    Raises:
        InputError: an order above 3.
    """
    if config.solver_order not in _ORDERS:
        raise InputError(
            f"{name}: solver_order in the scheduler's configuration",
            got=config.solver_order,
            expected="1, 2 or 3",
        )
    timesteps, sigmas = timesteps_and_sigmas(config, steps)
    if config.use_karras_sigmas and config.final_sigmas_type == "sigma_min":
        sigmas[-1] = sigmas[-2]  # as diffusers: the lowest sigma in use, not training's
    calls = len(timesteps)
    b = np.zeros((calls, 1 + HISTORY))
    table = clean_table(name, config, timesteps, sigmas, b)
    before = np.zeros(1 + HISTORY)
    for i in range(calls):
        if i > 0 and i - 1 not in config.disable_corrector:
            corrected = _corrected(config, sigmas, i, _order(config, calls, i - 1))
            b[i] = table.a[i] * (corrected - before)
        predicted = _predicted(config, sigmas, i, _order(config, calls, i))
        b[i] += predicted
        before = np.append(0.0, predicted[:-1])  # the same weights, counted from the next call
    return table


def _order(config: SchedulerConfig, calls: int, i: int) -> int:
    left = calls - i if config.lower_order_final else config.solver_order
    return min(config.solver_order, left, i + 1)


def _predicted(config: SchedulerConfig, sigmas: Floats, i: int, order: int) -> Floats:
    """Return the weights of the outputs i, i - 1, ... in x_(i+1), without the term of x_i."""
    alpha, grow, scale = _step(config, sigmas[i], sigmas[i + 1])
    weights = np.zeros(1 + HISTORY)
    weights[0] = -alpha * grow
    if order == 1:
        return weights
    ratios = _ratios(sigmas, i, order)
    rho = np.array([0.5])  # the paper's simplification for order 2
    if order > 2:
        matrix, right = _conditions(config, ratios, sigmas[i], sigmas[i + 1])
        rho = np.linalg.solve(matrix[:-1, :-1], right[:-1])
    return weights - alpha * scale * _differences(rho / ratios[:-1], at=0)


def _corrected(config: SchedulerConfig, sigmas: Floats, i: int, order: int) -> Floats:
    """Return the weights of the outputs i, i - 1, ... in the corrected x_i."""
    alpha, grow, scale = _step(config, sigmas[i - 1], sigmas[i])
    weights = np.zeros(1 + HISTORY)
    weights[1] = -alpha * grow
    ratios = _ratios(sigmas, i - 1, order)
    rho = np.array([0.5])
    if order > 1:
        matrix, right = _conditions(config, ratios, sigmas[i - 1], sigmas[i])
        rho = np.linalg.solve(matrix, right)
    newest = np.zeros(1 + HISTORY)
    newest[:2] = rho[-1], -rho[-1]
    return weights - alpha * scale * (_differences(rho[:-1] / ratios[:-1], at=1) + newest)


def _step(config: SchedulerConfig, now: float, then: float) -> tuple[float, float, float]:
    """Return alpha at the end, exp(-h) - 1, and the paper's B(h)."""
    grow = then / now - 1
    scale = np.log(then / now) if config.solver_type == "bh1" else grow
    return 1 / np.hypot(then, 1.0), grow, scale


def _ratios(sigmas: Floats, i: int, order: int) -> Floats:
    """Return the paper's r of the past outputs: distances from call i in log(1 / sigma); then 1."""
    past = sigmas[i - np.arange(1, order)]
    return np.append(np.log(sigmas[i] / past) / np.log(sigmas[i] / sigmas[i + 1]), 1.0)


def _conditions(
    config: SchedulerConfig, ratios: Floats, now: float, then: float
) -> tuple[Floats, Floats]:
    """Return R and b of the order conditions R rho = b."""
    orders = np.arange(len(ratios))
    h = np.log(then / now)  # negative for clean latents
    _, grow, scale = _step(config, now, then)
    phi, factorial = grow / h - 1, 1.0
    right = np.zeros(len(ratios))
    for k in orders:
        right[k] = phi * factorial / scale
        factorial *= k + 2
        phi = phi / h - 1 / factorial
    return ratios[None, :] ** orders[:, None], right


def _differences(weights: Floats, *, at: int) -> Floats:
    """Return weights for the differences between the outputs after `at` and the output at `at`."""
    out = np.zeros(1 + HISTORY)
    out[at] = -weights.sum()
    out[at + 1 : at + 1 + len(weights)] = weights
    return out
