"""The C library of cpp_ext for tests: compiled, and called through ctypes."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sld_edge.runtime.contract import INPUTS, OUTPUTS, PREDICTIONS, shape_of

Array = NDArray[Any]
Feeds = dict[str, Array]
Step = Callable[..., Feeds]
CPP = Path(__file__).parents[1] / "cpp_ext"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
ABI_VERSION = 2
EXACT = ["-std=c++20", "-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-fopenmp"]
SOURCES = [
    *(f"-I{CPP / folder}" for folder in ("include", "src", "tests/cuda_on_cpu")),
    *(str(CPP / "src" / name) for name in ("step.cpp", "safe_step.cpp")),
    *("-x", "c++", str(CPP / "src" / "safe_step.cu"), "-x", "none"),
]  # the CUDA part as loops


class CStep(ctypes.Structure):
    """`sld_edge_step` of the header, as test_header.py checks."""

    _fields_ = [
        ("abi_version", ctypes.c_uint32),
        ("prediction_type", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("concepts", "images", "height", "width")),
        *((name, ctypes.c_void_p) for name in (*INPUTS, *OUTPUTS)),
    ]


def program_of(*names: str) -> str | None:
    """Return the first of some programs that is here, in the virtual environment or elsewhere."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return next(filter(None, (shutil.which(name, path=path) for name in names)), None)


def run(*command: object) -> str:
    """Run a program that must succeed, and return what it printed."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def installed_by(cmake: str, folder: Path, *options: str) -> Path:
    """Build the shared library with CMake and install it; return the folder of lib and include."""
    prefix = folder / "installed"
    names = [f"-DCMAKE_INSTALL_PREFIX={prefix}", "-DCMAKE_INSTALL_LIBDIR=lib"]
    run(cmake, "-S", CPP, "-B", folder, "-DBUILD_SHARED_LIBS=ON", *names, *options)
    run(cmake, "--build", folder)
    run(cmake, "--install", folder)
    return prefix


def opened(library: Path) -> ctypes.CDLL:
    """Return a library with the types of its functions."""
    native = ctypes.CDLL(str(library))
    native.sld_edge_cuda_workspace_bytes.restype = ctypes.c_size_t
    native.sld_edge_status_message.restype = ctypes.c_char_p
    return native


def bound(feeds: Mapping[str, Array], outputs: Mapping[str, Array]) -> CStep:
    """Return the struct of a step; C does not see the types and shapes, so they are checked."""
    n, images, _, height, width = feeds["noise_pred_safety"].shape
    sizes = {"B": images, "n": n, "h": height, "w": width}
    half = feeds["noise_pred_text"].dtype == np.float16
    arrays = {**feeds, **outputs}
    for name in (*INPUTS, *OUTPUTS):
        array, kind = arrays[name], np.float16 if half and name in PREDICTIONS else np.float32
        assert array.dtype == kind, name
        assert array.shape == shape_of(name, sizes), name
        assert array.flags.c_contiguous, name
    return CStep(
        abi_version=ABI_VERSION,
        prediction_type=int(half),
        concepts=n,
        images=images,
        height=height,
        width=width,
        **{name: array.ctypes.data for name, array in arrays.items()},
    )


def empty_outputs(feeds: Mapping[str, Array]) -> Feeds:
    """Return arrays for a step's outputs."""
    n, images, _, height, width = feeds["noise_pred_safety"].shape
    sizes = {"B": images, "n": n, "h": height, "w": width}
    return {name: np.empty(shape_of(name, sizes), np.float32) for name in OUTPUTS}


def step_of(library: Path) -> Step:
    """Return a library's step, on the CPU or with the CUDA function, as a function of arrays."""
    native = opened(library)

    def step(feeds: Mapping[str, Array], *, threads: int = 1, cuda: bool = False) -> Feeds:
        outputs = empty_outputs(feeds)
        reference = ctypes.byref(bound(feeds, outputs))
        if cuda:
            size = native.sld_edge_cuda_workspace_bytes(reference)
            space = ctypes.create_string_buffer(size)
            status = native.sld_edge_safe_step_cuda(reference, space, ctypes.c_size_t(size), None)
        else:
            status = native.sld_edge_safe_step_cpu(reference, threads)
        assert status == 0, native.sld_edge_status_message(status)
        return outputs

    return step
