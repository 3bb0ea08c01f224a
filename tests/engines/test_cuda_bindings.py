"""Every call of CUDA that the code makes exists in the installed bindings, and in the stand-in."""

from __future__ import annotations

import inspect
import re
from enum import IntEnum
from typing import Any

import pytest

from oracles import tensorrt_signatures
from sld_edge.engines.cuda import api as cuda_api
from standin.cuda import CaptureMode, DeviceAttr, Error, FakeCuda, MemcpyKind

cudart: Any = pytest.importorskip("cuda.bindings.runtime")

CUDA_MEMBERS = sorted(
    {
        pair
        for file in tensorrt_signatures.USERS
        for pair in tensorrt_signatures.enum_members(file, ("_cuda",))
    }
)
CUDA_CALLS = [name for name, _ in inspect.getmembers(cuda_api.CudaRuntime, inspect.isfunction)]
CUDA_CALLS = [name for name in CUDA_CALLS if name.startswith("cuda")]


@pytest.mark.parametrize("name", CUDA_CALLS)
def test_cuda_has_every_call_with_our_parameters(name: str) -> None:
    signature = getattr(cudart, name).__doc__.splitlines()[0]
    inside = re.fullmatch(rf"{name}\((.*)\)", signature)
    assert inside is not None, signature
    theirs = [part.split(":")[0].split()[-1] for part in inside[1].split(", ") if part]
    ours = list(inspect.signature(getattr(cuda_api.CudaRuntime, name)).parameters)[1:]
    assert ours == theirs
    assert list(inspect.signature(getattr(FakeCuda, name)).parameters)[1:] == ours


def test_cuda_has_every_constant() -> None:
    constants = cuda_api.CudaRuntime.__annotations__
    assert {"cudaStreamNonBlocking", "cudaMemcpyKind"} <= constants.keys()
    for name in constants:
        assert hasattr(cudart, name)
    assert FakeCuda.cudaStreamNonBlocking == cudart.cudaStreamNonBlocking
    assert FakeCuda.cudaEventBlockingSync == cudart.cudaEventBlockingSync


@pytest.mark.parametrize(("owner", "member"), CUDA_MEMBERS)
def test_cuda_has_every_member_of_an_enum(owner: str, member: str) -> None:
    assert hasattr(getattr(cudart, owner), member)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Error, "cudaError_t"),
        (MemcpyKind, "cudaMemcpyKind"),
        (CaptureMode, "cudaStreamCaptureMode"),
        (DeviceAttr, "cudaDeviceAttr"),
    ],
)
def test_the_stand_in_has_cudas_numbers(ours: type[IntEnum], theirs: str) -> None:
    for member in ours:
        assert int(getattr(getattr(cudart, theirs), member.name)) == member.value
