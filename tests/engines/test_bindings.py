"""Every call of CUDA and TensorRT that the code makes exists in the real bindings.

The installed ones are asked themselves; of classic TensorRT, which is installed on no machine
without a GPU, the names in its bindings are kept in tensorrt_names.json (see names_table.py).
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import re
from enum import IntEnum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from sld_edge.engines.cuda import api as cuda_api
from sld_edge.engines.tensorrt import api as trt_api
from sld_edge.engines.tensorrt import builder_api as trt_builder_api
from standin import tensorrt as standin_tensorrt
from standin.cuda import CaptureMode, DeviceAttr, Error, FakeCuda, MemcpyKind


def _names_table() -> ModuleType:
    path = Path(__file__).with_name("names_table.py")
    spec = importlib.util.spec_from_file_location("names_table", path)
    assert isinstance(spec, ModuleSpec)
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


names_table = _names_table()
trt: Any = pytest.importorskip("tensorrt_rtx")
cudart: Any = pytest.importorskip("cuda.bindings.runtime")
TABLE: dict[str, dict[str, bool]] = json.loads(names_table.TABLE.read_text())

MEMBERS = sorted(
    {pair for page in names_table.PAGES for pair in names_table.protocol_members(page)}
)
ENUM_MEMBERS = sorted(
    {pair for file in names_table.USERS for pair in names_table.enum_members(file, ("trt", "_trt"))}
)
CUDA_MEMBERS = sorted(
    {pair for file in names_table.USERS for pair in names_table.enum_members(file, ("_cuda",))}
)
CUDA_CALLS = [name for name, _ in inspect.getmembers(cuda_api.CudaRuntime, inspect.isfunction)]
CUDA_CALLS = [name for name in CUDA_CALLS if name.startswith("cuda")]

# Absent from every version of classic TensorRT: used only where the flavour is TensorRT-RTX.
RTX_ONLY = {
    "ComputeCapability": "plans for several devices in one, built on any machine",
    "num_compute_capabilities": "the same",
    "set_compute_capability": "the same",
    "CudaGraphStrategy": "capturing by itself",
    "WHOLE_GRAPH_CAPTURE": "the same",
    "cuda_graph_strategy": "the same",
    "IRuntimeCache": "what was compiled on the device that runs the plan",
    "create_runtime_cache": "the same",
    "set_runtime_cache": "the same",
    "deserialize": "the same; of IRuntimeCache",
}
# Classic TensorRT has them too by now; the code uses them where the flavour is TensorRT-RTX.
NOT_IN_10_3 = RTX_ONLY | {
    "IRuntimeConfig": "strategy and cache of TensorRT-RTX; a classic context takes a strategy",
    "create_runtime_config": "the same",
    "set_execution_context_allocation_strategy": "the same",
}


def owner_of(protocol: str) -> Any:
    name = names_table.CLASSES[protocol]
    return getattr(trt, name) if name else trt


# --- TensorRT-RTX, which is installed -------------------------------------------------------------


@pytest.mark.parametrize(("protocol", "member"), MEMBERS)
def test_tensorrt_rtx_has_every_member_of_our_pages(protocol: str, member: str) -> None:
    assert hasattr(owner_of(protocol), member)


def test_every_protocol_is_matched_with_a_class() -> None:
    for page in (trt_api, trt_builder_api):
        own = {
            name
            for name, value in vars(page).items()
            if isinstance(value, type) and value.__module__ == page.__name__
        }
        assert own <= names_table.CLASSES.keys()


def _signatures(function: Any) -> list[list[str]]:
    """Parameters of every overload that a docstring of pybind11 names, without `self`."""
    found = []
    for text in re.findall(rf"\b{function.__name__}\((self: .*?)\) -> ", function.__doc__):
        # Commas inside brackets part no parameters.
        flat = re.sub(r"\[[^\[\]]*\]", "", re.sub(r"\[[^\[\]]*\]", "", text))
        found.append(flat.split(", ")[1:])
    return found


@pytest.mark.parametrize(
    ("protocol", "member"),
    [
        (protocol, member)
        for protocol, member in MEMBERS
        if names_table.CLASSES[protocol]
        and inspect.isfunction(
            getattr(getattr(trt_api, protocol, None), member, None)
            or getattr(getattr(trt_builder_api, protocol, None), member, None)
        )
    ],
)
def test_tensorrt_rtx_takes_as_many_arguments(protocol: str, member: str) -> None:
    page = trt_api if hasattr(trt_api, protocol) else trt_builder_api
    ours = len(inspect.signature(getattr(getattr(page, protocol), member)).parameters) - 1
    overloads = _signatures(getattr(owner_of(protocol), member))
    assert overloads
    assert any(
        sum(" = " not in parameter for parameter in overload) <= ours <= len(overload)
        for overload in overloads
    ), overloads


@pytest.mark.parametrize(("owner", "member"), ENUM_MEMBERS)
def test_tensorrt_rtx_has_every_member_of_an_enum(owner: str, member: str) -> None:
    assert hasattr(getattr(trt, owner), member)


def test_the_walk_finds_what_is_used() -> None:
    assert {
        ("ExecutionContextAllocationStrategy", "USER_MANAGED"),
        ("CudaGraphStrategy", "WHOLE_GRAPH_CAPTURE"),
        ("TensorIOMode", "INPUT"),
        ("ILogger", "INTERNAL_ERROR"),  # by another name
        ("BuilderFlag", "STRIP_PLAN"),
        ("HardwareCompatibilityLevel", "AMPERE_PLUS"),
        ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"),  # by getattr
    } <= set(ENUM_MEMBERS)
    assert ("cudaMemcpyKind", "cudaMemcpyHostToDevice") in CUDA_MEMBERS
    assert ("ExecutionContext", "execute_async_v3") in MEMBERS
    assert ("Builder", "build_serialized_network") in MEMBERS


# --- classic TensorRT, by its names ---------------------------------------------------------------


def test_the_table_covers_what_is_used() -> None:
    used = names_table.used_names().keys() - {""}
    assert list(TABLE) == ["10.3.0", "10.13.0.35", "11.4.0.106"]
    for version, names in TABLE.items():
        assert names.keys() == used, f"{version}: make the table again, see names_table.py"


@pytest.mark.parametrize(
    ("version", "absent"),
    [("10.3.0", NOT_IN_10_3), ("10.13.0.35", RTX_ONLY), ("11.4.0.106", RTX_ONLY)],
)
def test_classic_tensorrt_has_every_name_but_known_ones(
    version: str, absent: dict[str, str]
) -> None:
    assert {name for name, there in TABLE[version].items() if not there} == absent.keys()


def test_the_table_is_what_the_installed_library_says() -> None:
    """Here that of TensorRT 11.4, where its bindings are installed: they need not load."""
    spec = importlib.util.find_spec("tensorrt_bindings")
    if spec is None or spec.origin is None:
        pytest.skip("tensorrt_bindings is not installed")
    library = Path(spec.origin).with_name("tensorrt.so")
    if not next(library.parent.parent.glob("tensorrt_*bindings-11.4.0.106.dist-info"), None):
        pytest.skip("tensorrt_bindings of another version is installed")
    assert names_table.present(TABLE["11.4.0.106"], library) == TABLE["11.4.0.106"]


def test_the_search_would_miss_nothing(tmp_path: Path) -> None:
    library = tmp_path / "tensorrt.so"
    library.write_bytes(b"\x7fELF\0get_tensor_name\0shape_of\0")
    library.with_name("__init__.py").write_text("def nptype(trt_type):\n    pass\n")
    names = ["get_tensor_name", "name", "shape", "nptype", "trt_type"]
    assert names_table.present(names, library) == {
        "get_tensor_name": True,
        "name": True,
        "shape": False,
        "nptype": True,
        "trt_type": False,
    }


# --- CUDA -----------------------------------------------------------------------------------------


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


# --- the stand-in is like them --------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "name",
    [
        "TensorIOMode",
        "DataType",
        "ExecutionContextAllocationStrategy",
        "CudaGraphStrategy",
        "ComputeCapability",
    ],
)
def test_the_stand_in_has_tensorrts_numbers(name: str) -> None:
    ours = standin_tensorrt.TensorRTModule.only_rtx.get(name) or getattr(standin_tensorrt, name)
    for member in ours:
        assert int(getattr(trt, name).__members__[member.name]) == member.value


@pytest.mark.parametrize(
    "protocol",
    [
        name
        for name in names_table.CLASSES
        if isinstance(getattr(standin_tensorrt, name, None), type)
    ],
)
def test_the_stand_in_has_no_call_that_tensorrt_has_not(protocol: str) -> None:
    ours = getattr(standin_tensorrt, protocol)
    public = {
        name
        for name, value in vars(ours).items()
        if not name.startswith("_") and (callable(value) or isinstance(value, property))
    }
    assert public
    assert all(hasattr(owner_of(protocol), name) for name in public), public
