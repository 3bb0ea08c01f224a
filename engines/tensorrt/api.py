"""The types of every TensorRT call that runs a plan, for both flavours.

TensorRT and TensorRT-RTX have the same classes in two modules, and neither ships types. So mypy
checks our code against this page, and a test compares the page with the installed `tensorrt_rtx`
and with the table of names of other versions. `builder_api` has the calls that build a plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class ExecutionContext(Protocol):
    """`IExecutionContext`: an engine with shapes, addresses and activation memory."""

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool: ...
    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool: ...
    def get_tensor_shape(self, name: str) -> Sequence[int]: ...
    def set_tensor_address(self, name: str, memory: int) -> bool: ...
    def infer_shapes(self) -> list[str]: ...
    def update_device_memory_size_for_shapes(self) -> int: ...
    def set_device_memory(self, memory: int, size: int) -> None: ...
    def execute_async_v3(self, stream_handle: int) -> bool: ...


class RuntimeConfig(Protocol):
    """`IRuntimeConfig` (TensorRT-RTX): how a context compiles and caches its kernels."""

    cuda_graph_strategy: Any
    dynamic_shapes_kernel_specialization_strategy: Any

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None: ...
    def create_runtime_cache(self) -> RuntimeCache: ...
    def set_runtime_cache(self, cache: RuntimeCache) -> bool: ...


class RuntimeCache(Protocol):
    """`IRuntimeCache` (TensorRT-RTX): kernels that were compiled on this machine."""

    def serialize(self) -> Any: ...
    def deserialize(self, blob: bytes) -> bool: ...


class CudaEngine(Protocol):
    """`ICudaEngine`: a plan in device memory."""

    num_io_tensors: int

    def get_tensor_name(self, index: int) -> str: ...
    def get_tensor_mode(self, name: str) -> Any: ...
    def get_tensor_dtype(self, name: str) -> Any: ...
    def get_tensor_shape(self, name: str) -> Sequence[int]: ...
    def get_tensor_profile_shape(
        self, name: str, profile_index: int
    ) -> Sequence[Sequence[int]]: ...
    def create_execution_context(self, argument: Any, /) -> ExecutionContext | None: ...


class RtxCudaEngine(CudaEngine, Protocol):
    """The part of `ICudaEngine` that only TensorRT-RTX has."""

    def create_runtime_config(self) -> RuntimeConfig: ...


class Runtime(Protocol):
    """`Runtime`: turns a plan's bytes into an engine."""

    engine_host_code_allowed: bool

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> CudaEngine | None: ...


class Refitter(Protocol):
    """`Refitter`: puts weights into an engine that was built without weights (classic TensorRT)."""

    def refit_cuda_engine(self) -> bool: ...
    def get_missing_weights(self) -> Sequence[str]: ...


class OnnxParserRefitter(Protocol):
    """`OnnxParserRefitter`: reads those weights from the ONNX file."""

    def refit_from_file(self, model: str) -> bool: ...


class TensorRT(Protocol):
    """The module, `tensorrt` or `tensorrt_rtx`."""

    __version__: str
    ILogger: Any
    Runtime: Any
    TensorIOMode: Any
    DataType: Any
    ExecutionContextAllocationStrategy: Any
    CudaGraphStrategy: Any  # TensorRT-RTX
    DynamicShapesKernelSpecializationStrategy: Any  # TensorRT-RTX
    Refitter: Any  # for stripped plans
    OnnxParserRefitter: Any

    def nptype(self, trt_type: Any) -> type: ...
