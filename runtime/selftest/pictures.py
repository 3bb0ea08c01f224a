"""The pictures of the self-test."""

from __future__ import annotations

from itertools import product
from typing import Any

from sld_edge.runtime.pipeline import Pipeline
from sld_edge.runtime.result import Result

# The preset medium edits two thirds of the latent. Rounding barely changes these two seeds; it
# sends others of euler-a to another picture (5 levels in the mean, in FP16 on the CPU).
PROMPT, SEED, COUNT, STEPS = "a skull in an alley", 7, 2, 10
REPEATED_STEPS = 4  # of the picture that is made again and again
IMAGES = tuple(product(("ddim", "euler-a"), ("off", "medium", "max")))  # euler-a adds noise


def made(pipeline: Pipeline, sampler: str, safety: str, **asked: Any) -> Result:
    """Make the self-test's pictures with a sampler and a preset; `asked` changes the request."""
    request = {"steps": STEPS, "seed": SEED, "count": COUNT, **asked}
    return pipeline(PROMPT, sampler=sampler, safety=safety, **request)


class Reference:
    """Makes the self-test's pictures with a pipeline, each once, and keeps them."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self._kept: dict[tuple[str, str], Result] = {}

    def made(self, sampler: str, safety: str) -> Result:
        """Return the pictures of a sampler and a preset."""
        if (sampler, safety) not in self._kept:
            self._kept[sampler, safety] = made(self.pipeline, sampler, safety)
        return self._kept[sampler, safety]
