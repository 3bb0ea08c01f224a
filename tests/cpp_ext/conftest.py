"""The native code compiled for the tests, and a step's inputs."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sld_edge.cpp_ext import empty_outputs
from sld_edge.cpp_ext.arguments import check_inputs
from sld_edge.runtime.contract import INPUTS, OUTPUTS

Array = NDArray[Any]
Feeds = dict[str, Array]
Step = Callable[..., Feeds]
CPP = Path(__file__).parents[2] / "cpp_ext"
EXACT = ["-std=c++20", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-fopenmp"]
SOURCES = [
    *(f"-I{CPP / folder}" for folder in ("include", "src", "tests/cuda_on_cpu")),
    *(str(CPP / "src" / name) for name in ("step.cpp", "safe_step.cpp")),
    *("-x", "c++", str(CPP / "src" / "safe_step.cu"), "-x", "none"),
]  # the CUDA part as loops


class CStep(ctypes.Structure):
    """`sld_edge_step` of the header; test_header.py holds the header against the contract."""

    _fields_ = [
        ("abi_version", ctypes.c_uint32),
        ("prediction_type", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("concepts", "images", "height", "width")),
        *((name, ctypes.c_void_p) for name in (*INPUTS, *OUTPUTS)),
    ]


@pytest.fixture(scope="session")
def compiler() -> str:
    found = shutil.which("c++") or shutil.which("g++")
    if found is None:
        pytest.skip("no C++ compiler here")
    return found


def build(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def library(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C library as CMake makes it, with the CUDA part as loops."""
    path = tmp_path_factory.mktemp("native") / "libsld_edge.so"
    build([compiler, "-O3", *EXACT, "-shared", "-fPIC", *SOURCES, "-o", str(path)])
    return path


@pytest.fixture(scope="session")
def c_step(library: Path) -> Step:
    """A step through the C interface, on the CPU or with the CUDA kernels as loops."""
    native = ctypes.CDLL(str(library))
    native.sld_edge_cuda_workspace_bytes.restype = ctypes.c_size_t

    def run(feeds: Mapping[str, Array], *, threads: int = 1, cuda: bool) -> Feeds:
        sizes = check_inputs(feeds)
        outputs = empty_outputs(sizes)
        step = CStep(
            abi_version=2,
            prediction_type=int(feeds["noise_pred_text"].dtype == np.float16),
            concepts=sizes["n"],
            images=sizes["B"],
            height=sizes["h"],
            width=sizes["w"],
            **{name: array.ctypes.data for name, array in {**feeds, **outputs}.items()},
        )
        if cuda:
            size = native.sld_edge_cuda_workspace_bytes(ctypes.byref(step))
            space = ctypes.create_string_buffer(size)
            arguments = (ctypes.byref(step), space, ctypes.c_size_t(size), None)
            status = native.sld_edge_safe_step_cuda(*arguments)
        else:
            status = native.sld_edge_safe_step_cpu(ctypes.byref(step), threads)
        assert status == 0
        return outputs

    return run


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
