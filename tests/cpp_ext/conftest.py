"""The C library compiled once for the tests, and a step's inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from c_library import EXACT, SOURCES, Array, Feeds, Step, program_of, run, step_of


@pytest.fixture(scope="session")
def compiler() -> str:
    return here("C++ compiler", "c++", "g++")


@pytest.fixture(scope="session")
def c_compiler() -> str:
    return here("C compiler", "cc", "gcc")


@pytest.fixture(scope="session")
def cmake() -> str:
    here("tool for CMake", "make", "ninja")
    return here("CMake", "cmake")


def here(kind: str, *names: str) -> str:
    program = program_of(*names)
    if program is None:
        pytest.skip(f"no {kind} here: {', '.join(names)}")
    return program


@pytest.fixture(scope="session")
def library(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with CMake's flags, and with the CUDA part as loops."""
    path = tmp_path_factory.mktemp("native") / "libsld_edge.so"
    run(compiler, "-O3", *EXACT, "-shared", "-fPIC", *SOURCES, "-o", path)
    return path


@pytest.fixture(scope="session")
def c_step(library: Path) -> Step:
    """A step through the C interface, on the CPU or with the CUDA kernels as loops."""
    return step_of(library)


@pytest.fixture
def make_feeds() -> Callable[..., Feeds]:
    """Inputs with differences below, above and exactly at the thresholds.

    `unit` is the column noise_unit; without it a random number, positive or negative.
    """

    def make(
        images: int = 2,
        concepts: int = 1,
        height: int = 5,
        width: int = 7,
        *,
        half: bool = False,
        seed: int = 7,
        unit: float | None = None,
    ) -> Feeds:
        rng = np.random.default_rng(seed)
        image = (images, 4, height, width)

        def normal(*shape: int) -> Array:
            return rng.standard_normal(shape, np.float32)

        if unit is None:
            unit = float(rng.uniform(0.1, 2) * rng.choice([-1, 1]))
        # Multiples of 1/64 subtract without rounding: some d are exactly 0.25 * unit, a threshold.
        text = np.round(normal(*image) * 64) / 64
        d = np.round(normal(concepts, *image) * 32) / 64
        steps = np.array([0.25, 0.01, 0.0], np.float32) * np.float32(abs(unit))
        thresholds = np.resize(steps, images)
        scales = np.resize(np.array([2.0, 10.0, 1000.0], np.float32), images)
        active = np.resize(np.array([1, 1, 1, 0], np.float32), images)
        momentum = np.resize(np.array([[0.3, 0.4], [0.5, 0.7]], np.float32), (images, 2))
        kind = np.float16 if half else np.float32
        return {
            "noise_pred_uncond": normal(*image).astype(kind),
            "noise_pred_text": text.astype(kind),
            "noise_pred_safety": (text - d).astype(kind),
            "latents": normal(*image),
            "momentum": normal(*image),
            "history": normal(4, *image),
            "noise": normal(*image),
            "edit_map": np.abs(normal(images, height, width)),
            "row": np.append(normal(10), np.float32(unit)),
            "guidance_scale": np.resize(np.array([7.5, 1.0, 3.0], np.float32), images),
            "safety": np.column_stack([scales, thresholds, momentum, active]).astype(np.float32),
        }

    return make
