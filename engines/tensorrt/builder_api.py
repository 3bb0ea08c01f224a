"""The types of every TensorRT call that builds a plan; `api` has the calls that run a plan.

Both flavours have these names unless a comment says otherwise; a test compares the page with the
installed `tensorrt_rtx`. Where it says `bytes`, TensorRT gives an `IHostMemory`, a buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class NetworkTensor(Protocol):
    """`ITensor`: an input or output of a network; a size of -1 is known only at run time."""

    name: str
    dtype: Any
    shape: Sequence[int]


class NetworkDefinition(Protocol):
    """`INetworkDefinition`: what the parser fills."""

    num_inputs: int
    num_outputs: int

    def get_input(self, index: int) -> NetworkTensor: ...
    def get_output(self, index: int) -> NetworkTensor: ...


class ParserError(Protocol):
    """`ParserError`: the node that could not be read, and why."""

    def desc(self) -> str: ...
    def node_name(self) -> str: ...
    def node_operator(self) -> str: ...


class OnnxParser(Protocol):
    """`OnnxParser`: reads an ONNX file and its external data."""

    num_errors: int

    def parse_from_file(self, model: str) -> bool: ...
    def get_error(self, index: int) -> ParserError: ...


class OptimizationProfile(Protocol):
    """`IOptimizationProfile`: least, best and largest shape of every input."""

    def set_shape(
        self, input: str, min: Sequence[int], opt: Sequence[int], max: Sequence[int]
    ) -> None: ...


class TimingCache(Protocol):
    """`ITimingCache` (classic): how fast each kernel was on this device."""

    def serialize(self) -> bytes: ...


class BuilderConfig(Protocol):
    """`IBuilderConfig`: how to build."""

    builder_optimization_level: int
    hardware_compatibility_level: Any  # classic
    num_compute_capabilities: int  # TensorRT-RTX
    profiling_verbosity: Any
    progress_monitor: Any

    def set_flag(self, flag: Any) -> None: ...
    def clear_flag(self, flag: Any) -> None: ...
    def set_preview_feature(self, feature: Any, enable: bool) -> None: ...
    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None: ...
    def add_optimization_profile(self, profile: OptimizationProfile) -> int: ...
    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache | None: ...
    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool: ...
    def get_timing_cache(self) -> TimingCache | None: ...
    def set_compute_capability(self, compute_capability: Any, index: int) -> bool: ...  # RTX


class Builder(Protocol):
    """`Builder`: makes the objects above, and the plan from them."""

    def create_network(self, flags: int) -> NetworkDefinition: ...
    def create_builder_config(self) -> BuilderConfig: ...
    def create_optimization_profile(self) -> OptimizationProfile: ...
    def build_serialized_network(
        self, network: NetworkDefinition, config: BuilderConfig
    ) -> bytes | None: ...


class TensorRTBuilder(Protocol):
    """The module, `tensorrt` or `tensorrt_rtx`."""

    __version__: str
    ILogger: Any
    IProgressMonitor: Any
    Builder: Any
    OnnxParser: Any
    NetworkDefinitionCreationFlag: Any
    BuilderFlag: Any
    PreviewFeature: Any
    ProfilingVerbosity: Any
    MemoryPoolType: Any
    HardwareCompatibilityLevel: Any  # classic
    ComputeCapability: Any  # TensorRT-RTX

    def nptype(self, trt_type: Any) -> type: ...
