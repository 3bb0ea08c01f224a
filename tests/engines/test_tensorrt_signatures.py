"""Every call of TensorRT that the code makes is one that the real bindings take.

The installed tensorrt_rtx is read here. Other versions, among them classic TensorRT, which is
installed on no machine without a GPU, are kept in tensorrt_signatures.json.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import pytest

from lowest_versions import floor, stated
from oracles import tensorrt_signatures as real
from sld_edge.engines.tensorrt import api, builder_api
from standin import tensorrt as standin_tensorrt

TABLE: dict[str, real.Signatures] = json.loads(real.TABLE.read_text(encoding="utf-8"))
VERSIONS = dict(TABLE)
if find_spec("tensorrt_rtx"):
    trt: Any = import_module("tensorrt_rtx")
    VERSIONS["tensorrt_rtx installed"] = real.signatures(trt, real.used_names())

MEMBERS = sorted({pair for page in real.PAGES for pair in real.protocol_members(page)})
METHODS = {
    (protocol, member): call
    for page in (api, builder_api)
    for protocol, member in MEMBERS
    if real.CLASSES[protocol]
    and inspect.isfunction(call := getattr(getattr(page, protocol, None), member, None))
}
CONSTRUCTIONS = sorted({c for f in real.USERS for c in real.constructions(f, ("trt", "_trt"))})
ASSIGNED = set().union(*map(real.assignments, real.USERS))
ENUM_MEMBERS = {p for file in real.USERS for p in real.enum_members(file, ("trt", "_trt"))}

# Absent from every version of classic TensorRT: used only where the flavour is TensorRT-RTX.
RTX_ONLY = {
    "ComputeCapability": "plans for several devices in one, built on any machine",
    "IBuilderConfig.num_compute_capabilities": "the same",
    "IBuilderConfig.set_compute_capability": "the same",
    "CudaGraphStrategy": "capturing by itself",
    "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE": "the same",
    "IRuntimeConfig.cuda_graph_strategy": "the same",
    "DynamicShapesKernelSpecializationStrategy": "kernels compiled before the first run",
    "DynamicShapesKernelSpecializationStrategy.EAGER": "the same",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy": "the same",
    "IRuntimeCache": "what was compiled on the device that runs the plan",
    "IRuntimeCache.deserialize": "the same",
    "IRuntimeCache.serialize": "the same",
    "IRuntimeConfig.create_runtime_cache": "the same",
    "IRuntimeConfig.set_runtime_cache": "the same",
}
# Classic TensorRT has them too by now; the code uses them where the flavour is TensorRT-RTX.
NOT_IN_10_3 = RTX_ONLY | {
    "IRuntimeConfig": "strategy and cache of TensorRT-RTX; a classic context takes a strategy",
    "IRuntimeConfig.set_execution_context_allocation_strategy": "the same",
    "ICudaEngine.create_runtime_config": "the same",
}
ABSENT: dict[str, dict[str, str]] = {
    "tensorrt 10.3.0": NOT_IN_10_3,
    "tensorrt 10.13.3.9": RTX_ONLY,
    "tensorrt 11.4.0.106": RTX_ONLY,
}

# Types of our pages, and what versions call a type that takes or gives the same.
_TYPES = {
    "int": {"int", "SupportsInt", "SupportsIndex"},
    "bytes": {"buffer", "Buffer", "IHostMemory"},
    "Sequence[int]": {"tuple", "Dims"},
    "Sequence[Sequence[int]]": {"list[Dims]"},
    "Sequence[str]": {"list[str]"},
}


def _parts(parameters: str) -> list[str]:
    """Split at the commas that are inside no brackets."""
    return [part for part in re.split(r", (?![^\[]*\])", parameters) if part]


def _same_type(ours: str, theirs: str) -> bool:
    ours = ours.removesuffix(" | None")  # the bindings do not state that they may give None
    theirs = re.sub(r"typing(_extensions)?\.|nvinfer1::|nvonnxparser::I", "", theirs).replace(
        "List[", "list["
    )
    return ours == "Any" or theirs in _TYPES.get(ours, {real.CLASSES.get(ours, ours)})


def takes(theirs: str, ours: inspect.Signature) -> bool:
    """Whether a stated signature takes the call of one of our pages, and gives what it expects."""
    parameters, _, result = theirs[1:].rpartition(") -> ")
    places, given = _parts(parameters), list(ours.parameters.values())[1:]  # without self
    if len(places) < len(given) or not _same_type(ours.return_annotation, result):
        return False
    for place, parameter in zip(places, given, strict=False):
        name, _, kind = place.removesuffix(" = ...").partition(": ")
        named = parameter.kind is not parameter.POSITIONAL_ONLY
        if (named and name != parameter.name) or not _same_type(parameter.annotation, kind):
            return False
    return all(place.endswith(" = ...") for place in places[len(given) :])


@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_lacks_only_known_names(version: str) -> None:
    names = VERSIONS[version]
    assert names.keys() == real.used_names(), "make the table again: see tensorrt_signatures.py"
    absent = {name for name, signatures in names.items() if signatures is None}
    assert absent == ABSENT.get(version, {}).keys()


@pytest.mark.parametrize(("protocol", "member"), METHODS)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_takes_our_calls(version: str, protocol: str, member: str) -> None:
    signatures = VERSIONS[version][f"{real.CLASSES[protocol]}.{member}"]
    ours = inspect.signature(METHODS[protocol, member])
    assert signatures is None or any(takes(one, ours) for one in signatures), signatures


@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_takes_our_strategies_for_a_context(version: str) -> None:
    """Our page has Any there: a strategy, and with TensorRT-RTX a configuration."""
    signatures = str(VERSIONS[version]["ICudaEngine.create_execution_context"])
    assert "(strategy: ExecutionContextAllocationStrategy" in signatures
    assert "(runtime_config: IRuntimeConfig" in signatures or version == "tensorrt 10.3.0"


@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_makes_our_objects(version: str) -> None:
    for name, count in CONSTRUCTIONS:
        signatures = VERSIONS[version][name]
        assert signatures, name
        assert any(len(_parts(one[1:].partition(")")[0])) == count for one in signatures), name


@pytest.mark.parametrize("version", VERSIONS)
def test_a_versions_attributes_are_of_our_types_and_can_be_set_where_we_set(version: str) -> None:
    for protocol, member in MEMBERS:
        page = api if hasattr(api, protocol) else builder_api
        ours = getattr(page, protocol).__annotations__.get(member)
        signatures = VERSIONS[version][f"{real.CLASSES[protocol]}.{member}".removeprefix(".")]
        if ours is None or not real.CLASSES[protocol] or signatures is None:
            continue
        assert _same_type(ours, signatures[0].removeprefix("get() -> ")), member
        assert len(signatures) == 2 or member not in ASSIGNED, f"{member} cannot be set"


def test_every_protocol_is_matched_with_a_class() -> None:
    for page in (api, builder_api):
        own = {
            name
            for name, value in vars(page).items()
            if isinstance(value, type) and value.__module__ == page.__name__
        }
        assert own <= real.CLASSES.keys()


def test_the_walks_find_what_is_used() -> None:
    assert {
        ("ExecutionContextAllocationStrategy", "USER_MANAGED"),
        ("CudaGraphStrategy", "WHOLE_GRAPH_CAPTURE"),
        ("TensorIOMode", "INPUT"),
        ("ILogger", "INTERNAL_ERROR"),  # by another name
        ("BuilderFlag", "STRIP_PLAN"),
        ("HardwareCompatibilityLevel", "AMPERE_PLUS"),
        ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"),  # by getattr
    } <= ENUM_MEMBERS
    assert {("OnnxParser", 2), ("Runtime", 1), ("OnnxParserRefitter", 2)} <= set(CONSTRUCTIONS)
    assert {"progress_monitor", "num_compute_capabilities"} <= ASSIGNED
    assert METHODS.keys() >= {
        ("ExecutionContext", "execute_async_v3"),
        ("Builder", "create_network"),
    }


class _Page(Protocol):
    """A page with one call."""

    def call(self, name: str, shape: Sequence[int], size: int) -> bool: ...


@pytest.mark.parametrize(
    ("theirs", "taken"),
    [
        ("(name: str, shape: tuple, size: int) -> bool", True),
        ("(name: str, shape: Dims, size: typing.SupportsInt, more: int = ...) -> bool", True),
        ("(name: str, shape: tuple) -> bool", False),
        ("(name: str, shape: tuple, size: int, more: int) -> bool", False),
        ("(shape: tuple, name: str, size: int) -> bool", False),
        ("(name: str, shape: tuple, nbytes: int) -> bool", False),
        ("(name: int, shape: tuple, size: int) -> bool", False),
        ("(name: str, shape: tuple, size: int) -> None", False),
    ],
)
def test_a_wrong_call_would_be_seen(theirs: str, taken: bool) -> None:
    assert takes(theirs, inspect.signature(_Page.call)) is taken


def test_the_table_has_the_lowest_version_of_tensorrt_rtx() -> None:
    lowest = next(floor(one) for one in stated("rtx") if one.name == "tensorrt-rtx")
    assert any(wheel.startswith(f"tensorrt_rtx {lowest.partition('==')[2]}") for wheel in TABLE)


# --- the stand-in is like them --------------------------------------------------------------------


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
    pytest.importorskip("tensorrt_rtx")
    ours = standin_tensorrt.TensorRTModule.only_rtx.get(name) or getattr(standin_tensorrt, name)
    for member in ours:
        assert int(getattr(trt, name).__members__[member.name]) == member.value


@pytest.mark.parametrize(
    "protocol",
    [name for name in real.CLASSES if isinstance(getattr(standin_tensorrt, name, None), type)],
)
def test_the_stand_in_has_no_call_that_tensorrt_has_not(protocol: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    owner = getattr(trt, real.CLASSES[protocol]) if real.CLASSES[protocol] else trt
    ours = getattr(standin_tensorrt, protocol)
    public = {
        name
        for name, value in vars(ours).items()
        if not name.startswith("_") and (callable(value) or isinstance(value, property))
    }
    assert public
    assert all(hasattr(owner, name) for name in public), public
