"""A stand-in for a GPU: CUDA in host memory, and TensorRT on ONNX Runtime."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
from standin.cuda import FakeCuda
from standin.tensorrt import make_tensorrt

from sld_edge.engines.plan_info import Flavour
from sld_edge.runtime import Request

VERSIONS: dict[Flavour, str] = {"tensorrt-rtx": "1.7.1.116", "tensorrt": "10.3.0"}


def install(patch: pytest.MonkeyPatch, **settings: Any) -> FakeCuda:
    """Put the stand-ins where our code imports CUDA and both flavours of TensorRT."""
    cuda = FakeCuda(**settings)
    patch.setitem(sys.modules, "cuda", sys.modules.get("cuda", ModuleType("cuda")))
    bindings = sys.modules.get("cuda.bindings", ModuleType("cuda.bindings"))
    patch.setitem(sys.modules, "cuda.bindings", bindings)
    patch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    for flavour, version in VERSIONS.items():
        name = flavour.replace("-", "_")
        patch.setitem(sys.modules, name, make_tensorrt(flavour, version, cuda))
    return cuda


def request(prompt: str, **settings: Any) -> Request:
    """Ask for one image."""
    return Request(prompts=(prompt,), **settings)
