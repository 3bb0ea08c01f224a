"""What a UNet's output says of the clean latents and of the noise, as p * x + q * output.

x = alpha * clean + sigma * noise, alpha**2 + sigma**2 = 1; v is of arXiv 2202.00512, appendix D.
"""

from __future__ import annotations

import math


def clean_from_output(prediction_type: str, alpha: float, sigma: float) -> tuple[float, float]:
    """Give the pair for the clean latents."""
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction_type == "v_prediction":
        return alpha, -sigma
    return 0.0, 1.0


def noise_from_output(prediction_type: str, alpha: float, sigma: float) -> tuple[float, float]:
    """Give the pair for the noise."""
    if prediction_type == "epsilon":
        return 0.0, 1.0
    if prediction_type == "v_prediction":
        return sigma, alpha
    return 1 / sigma, -alpha / sigma


def slope_from_output(prediction_type: str, sigma: float) -> tuple[float, float]:
    """Give the pair for dx/dsigma, x = clean + sigma * noise as Karras et al. have it."""
    alpha = 1 / math.hypot(sigma, 1.0)
    p, q = noise_from_output(prediction_type, alpha, sigma * alpha)
    return p * alpha, q
