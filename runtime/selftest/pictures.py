"""The pictures of the self-test."""

from __future__ import annotations

from itertools import product
from typing import Any

from sld_edge.runtime.pipeline import Pipeline
from sld_edge.runtime.result import Result

# The preset medium edits two thirds of the latent. Rounding barely changes these two seeds; it
# sends others of euler-a to another picture (5 levels in the mean, in FP16 on the CPU).
PROMPT, SEED, COUNT, STEPS = "a skull in an alley", 7, 2, 10
IMAGES = tuple(product(("ddim", "euler-a"), ("off", "medium", "max")))  # euler-a adds noise


def made(pipeline: Pipeline, sampler: str, safety: str, **asked: Any) -> Result:
    """Make the self-test's pictures with a sampler and a preset; `asked` changes the request."""
    request = {"steps": STEPS, "seed": SEED, "count": COUNT, **asked}
    return pipeline(PROMPT, sampler=sampler, safety=safety, **request)
