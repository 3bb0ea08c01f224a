"""A stand-in for a GPU: CUDA and TensorRT in host memory, stricter than the real ones."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from oracles.requests import flat_request
from sld_edge.engines.tensorrt.plan_info import Flavour
from sld_edge.runtime.request import Request
from standin.cuda import FakeCuda, StandinError
from standin.plans import VERSIONS
from standin.tensorrt import make_tensorrt

__all__ = ["FakeCuda", "StandinError", "install", "request"]

_MODULES: dict[Flavour, str] = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}


def install(
    monkeypatch: pytest.MonkeyPatch,
    *,
    versions: dict[Flavour, str] | None = None,
    **device: Any,
) -> FakeCuda:
    """Put the stand-ins where CUDA's bindings and both TensorRTs are imported from.

    Args:
        monkeypatch: takes them out again.
        versions: of the flavours of TensorRT; a flavour that is missing here is not installed.
        device: as `FakeCuda` takes it: compute_capability, name, total_memory, driver, devices,
            integrated.
    """
    cuda = FakeCuda(**device)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    given = VERSIONS if versions is None else versions
    for flavour, name in _MODULES.items():
        module: ModuleType | None = None  # None there makes importing it fail
        if flavour in given:
            module = make_tensorrt(flavour, given[flavour], cuda)
        monkeypatch.setitem(sys.modules, name, module)
    return cuda


def request(*prompts: str, **settings: Any) -> Request:
    """Return a request for `Pipeline.plan`."""
    return flat_request(prompts=prompts, **settings)
