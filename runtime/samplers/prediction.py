"""Clean latents and noise from a UNet's output, as p * x + q * output.

x = alpha * clean + sigma * noise, alpha**2 + sigma**2 = 1; v is from arXiv 2202.00512, appendix D.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
SafetyUnits = Literal["noise", "raw"]
_LEAST_ALPHA = 0.068  # SD 1.5 at its first timestep; with less, no edit of a first call is possible


def noise_unit(prediction_type: str, alpha: Floats) -> Floats:
    """Return the difference in noise for a difference of 1 in the output, with x fixed.

    Safe Latent Diffusion's numbers are in units of predicted noise. From x = alpha * clean +
    sigma * noise follows alpha for v, and -alpha / sigma for "sample".

    Args:
        prediction_type: "epsilon", "v_prediction" or "sample".
        alpha: float64 [N], the signal's share of x at each call.
    """
    floored = np.maximum(alpha, _LEAST_ALPHA)
    if prediction_type == "v_prediction":
        return floored
    if prediction_type == "sample":
        # sigma is 0 at the last call of some schedules; the bound avoids a division by 0.
        return -floored / np.sqrt(np.maximum(1 - alpha**2, 1e-8))
    return np.ones(len(alpha))


def clean_from_output(prediction_type: str, alpha: float, sigma: float) -> tuple[float, float]:
    """Return p and q for the clean latents."""
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction_type == "v_prediction":
        return alpha, -sigma
    return 0.0, 1.0


def noise_from_output(prediction_type: str, alpha: float, sigma: float) -> tuple[float, float]:
    """Return p and q for the noise."""
    if prediction_type == "epsilon":
        return 0.0, 1.0
    if prediction_type == "v_prediction":
        return sigma, alpha
    return 1 / sigma, -alpha / sigma


def slope_from_output(prediction_type: str, sigma: float) -> tuple[float, float]:
    """Return p and q for dx/dsigma, with x = clean + sigma * noise as in Karras et al."""
    alpha = 1 / math.hypot(sigma, 1.0)
    p, q = noise_from_output(prediction_type, alpha, sigma * alpha)
    return p * alpha, q
