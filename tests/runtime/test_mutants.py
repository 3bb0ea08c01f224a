"""A wrong Safe Latent Diffusion must not pass for the right one.

The parity comparison runs with predictions on a coarse grid, the same for diffusers and for ours,
so that distances equal to the threshold do occur. The graph and its NumPy twin pass it, and each
deliberate mistake fails it by far.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from oracles.guidance import MISTAKES, Mistake, TwinEngine
from oracles.safe_pipeline import Case, Pair, Trace, disagreement, oracle_trace, our_trace, pair_of
from sld_edge.engines.base import Array, TensorSpec
from sld_edge.runtime import Safety
from sld_edge.runtime.denoise.job import Job

STEPS, SEED, SIZE = 7, 5, 64
LATENTS = 1e-5  # both sides get the same predictions; only the arithmetic after them differs
# Threshold on the grid, so that >= and > differ; momentum and warm-up that matter.
SAFETY = Safety(scale=1.5, warmup_steps=3, threshold=0.25, momentum_scale=0.5, momentum_beta=0.7)
CASE = Case(
    sampler="pndm",
    safety=SAFETY,
    steps=STEPS,
    seed=SEED,
    prompt="a star",
    concept="skull",
    size=SIZE,
)


class GridUnet:
    """Predictions that do not depend on the latents: quarters, one array a call."""

    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()

    def __init__(self) -> None:
        self.calls = 0

    def predictions(self, branches: int) -> Array:
        draw = np.random.default_rng([SEED, self.calls]).integers(-6, 7, (3, 4, 8, 8))
        self.calls += 1
        return (draw[:branches] / 4).astype(np.float32)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        return {"noise_pred": self.predictions(len(feeds["context"]))}

    def __enter__(self) -> GridUnet:
        return self

    def __exit__(self, *exc: object) -> None: ...


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair_of("sd1", Path(tmp_path_factory.mktemp("mutants")))


@pytest.fixture(scope="module")
def oracle(pair: Pair) -> Trace:
    unet = GridUnet()

    def forward(sample: Any, *_args: Any, **_kwargs: Any) -> Any:
        return SimpleNamespace(sample=torch.from_numpy(unet.predictions(len(sample))))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair.oracle.unet, "forward", forward)
        return oracle_trace(pair, CASE)


@pytest.fixture
def compare(pair: Pair, oracle: Trace) -> Callable[[TwinEngine | None], float]:
    """Return what runs ours, with the twin in the graph's place if given, against the oracle."""

    def run(twin: TwinEngine | None) -> float:
        with pytest.MonkeyPatch.context() as patch:
            engines = pair.ours._executor.store.engines
            patch.setitem(engines, "unet", GridUnet())
            if twin is not None:
                patch.setitem(engines, "guidance", twin)
            return disagreement(our_trace(pair, CASE), oracle)[0]

    return run


def test_the_graph_and_its_twin_pass(compare: Callable[[TwinEngine | None], float]) -> None:
    assert compare(None) <= LATENTS
    assert compare(TwinEngine()) <= LATENTS


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_arithmetic_fails(
    compare: Callable[[TwinEngine | None], float], mistake: Mistake
) -> None:
    assert compare(TwinEngine(mistake)) > 100 * LATENTS


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_warm_up_off_by_one_fails(
    compare: Callable[[TwinEngine | None], float], monkeypatch: pytest.MonkeyPatch, shift: int
) -> None:
    right = Job.safety
    monkeypatch.setattr(Job, "safety", lambda job, index: right(job, index + shift))
    assert compare(None) > 100 * LATENTS
