"""TensorRT on the CUDA stand-in: its calls and refusals, the arithmetic done by ONNX Runtime.

A run reads its inputs from where they lie, and writes its outputs, when its turn in the stream
comes. ONNX Runtime gets the very session that the CPU pipeline uses, so results agree to the last
bit. What TensorRT answers with False or None and a line in its log is answered so here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from functools import cache, partial
from itertools import combinations, product
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from oracles.prepared import prepared_engine
from sld_edge.engines.onnxruntime.engine import OrtEngine
from sld_edge.engines.tensorrt.plan_info import Flavour
from standin.cuda import ALIGNMENT, POISON, FakeCuda, Span, StandinError, Work
from standin.plans import MAGIC

_CAPABILITIES = ("75", "80", "86", "89", "120", "121")  # that TensorRT-RTX takes


class Severity(IntEnum):
    """`ILogger.Severity`."""

    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    """What a logger is derived from; its own constructor must have run."""

    Severity = Severity
    INTERNAL_ERROR = Severity.INTERNAL_ERROR
    ERROR = Severity.ERROR
    WARNING = Severity.WARNING
    INFO = Severity.INFO
    VERBOSE = Severity.VERBOSE

    def __init__(self) -> None:
        self._constructed = True

    def log(self, severity: Any, msg: str) -> None:
        """Take a message."""
        raise NotImplementedError("log")


class TensorIOMode(IntEnum):
    """Whether a tensor is an input, an output or none."""

    NONE = 0
    INPUT = 1
    OUTPUT = 2


class DataType(IntEnum):
    """Types of elements."""

    FLOAT = 0
    HALF = 1
    INT8 = 2
    INT32 = 3
    BOOL = 4
    UINT8 = 5
    BF16 = 7
    INT64 = 8


class ExecutionContextAllocationStrategy(IntEnum):
    """Who allocates a context's activation memory."""

    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class CudaGraphStrategy(IntEnum):
    """Whether TensorRT-RTX captures its runs (RTX only)."""

    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class DynamicShapesKernelSpecializationStrategy(IntEnum):
    """When TensorRT-RTX compiles kernels for the shapes of a run (RTX only)."""

    LAZY = 0
    EAGER = 1
    NONE = 2


_DTYPES = {
    DataType.FLOAT: np.float32,
    DataType.HALF: np.float16,
    DataType.INT8: np.int8,
    DataType.INT32: np.int32,
    DataType.BOOL: np.bool_,
    DataType.UINT8: np.uint8,
    DataType.INT64: np.int64,
}


class Dims(Sequence[int]):
    """A shape as TensorRT gives it: a sequence, and no tuple."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._sizes = tuple(sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: Any) -> Any:
        return self._sizes[index]


class _Module:
    """What all classes of one pretended TensorRT share."""

    def __init__(self, flavour: Flavour, version: str, cuda: FakeCuda) -> None:
        self.flavour, self.version, self.cuda = flavour, version, cuda
        self.compiled: list[str] = []
        self.broken = False
        self.contexts: list[str] = []  # components of the contexts, in order of their making

    @property
    def rtx(self) -> bool:
        return self.flavour == "tensorrt-rtx"


class Runtime:
    """Turns a plan into an engine."""

    def __init__(self, module: _Module, logger: ILogger) -> None:
        self._module, self._logger = module, _checked(logger)
        self.engine_host_code_allowed = False
        if module.broken:
            self._logger.log(Severity.ERROR, "CUDA initialization failure with error: 35")

    def deserialize_cuda_engine(self, serialized_engine: Any) -> CudaEngine | None:
        """Return the engine, or None and a line in the log."""
        if self._module.broken:
            raise StandinError("the real one dies here of a segmentation fault")
        if isinstance(serialized_engine, str):
            raise TypeError("deserialize_cuda_engine(): incompatible function arguments")
        plan = _plan(bytes(serialized_engine))
        why = "the stream is not a plan" if plan is None else self._misfit(plan)
        if plan is None or why:
            self._logger.log(Severity.ERROR, f"deserializeCudaEngine: {why}")
            return None
        return CudaEngine(self._module, self._logger, plan)

    def _misfit(self, plan: Mapping[str, Any]) -> str:
        module, options = self._module, plan["options"]
        if plan["flavour"] != module.flavour:
            return f"the plan is one of {plan['flavour']}"
        if options.get("version_compatible"):
            if not self.engine_host_code_allowed:
                return "the plan holds host code, which is not allowed"
            if _numbers(plan["version"]) > _numbers(module.version):
                return "the plan is of a later version"
        elif plan["version"] != module.version:
            return f"version tag {plan['version']} does not match {module.version}"
        major, minor = module.cuda.compute_capability
        if options.get("hardware_compatible"):
            return "" if major >= 8 else "the device is older than Ampere"
        if f"{major}.{minor}" not in plan["compute_capabilities"]:
            return f"the plan is not for compute capability {major}.{minor}"
        return ""


class CudaEngine:
    """`ICudaEngine`."""

    num_optimization_profiles = 1

    def __init__(self, module: _Module, logger: ILogger, plan: Mapping[str, Any]) -> None:
        self._module, self._logger, self.plan = module, logger, plan
        self.tensors: dict[str, dict[str, Any]] = {
            tensor["spec"]["name"]: tensor for tensor in [*plan["inputs"], *plan["outputs"]]
        }
        self.input_names = tuple(tensor["spec"]["name"] for tensor in plan["inputs"])
        self.output_names = tuple(tensor["spec"]["name"] for tensor in plan["outputs"])
        self.num_io_tensors = len(self.tensors)
        self.refitted = not plan["options"].get("strip_weights")

    def get_tensor_name(self, index: int) -> str:
        """Return a tensor's name."""
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        """Say what a tensor is."""
        if name in self.input_names:
            return TensorIOMode.INPUT
        if name in self.output_names:
            return TensorIOMode.OUTPUT
        self._logger.log(Severity.ERROR, f"getTensorIOMode: no tensor {name}")
        return TensorIOMode.NONE

    def get_tensor_dtype(self, name: str) -> DataType:
        """Return the type of a tensor's elements."""
        dtype = np.dtype(self._spec(name)["dtype"])
        return next(key for key, value in _DTYPES.items() if np.dtype(value) == dtype)

    def get_tensor_shape(self, name: str) -> Dims:
        """Return a tensor's shape, -1 where it is open."""
        shape = self._spec(name)["shape"]
        return Dims([size if isinstance(size, int) else -1 for size in shape])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        """Return the least, best and largest shape of an input."""
        if name not in self.input_names or profile_index != 0:
            raise StandinError(f"profile {profile_index} has no shapes of {name}")
        return [Dims(shape) for shape in self.tensors[name]["profile"]]

    def create_execution_context(self, argument: Any, /) -> ExecutionContext | None:
        """Return a context; memory as the strategy or the configuration says."""
        if isinstance(argument, ExecutionContextAllocationStrategy):
            return ExecutionContext(self._module, self._logger, self, argument, None)
        if self._module.rtx and isinstance(argument, RuntimeConfig):
            return ExecutionContext(self._module, self._logger, self, argument.strategy, argument)
        raise TypeError("create_execution_context(): incompatible function arguments")

    def create_runtime_config(self) -> RuntimeConfig:
        """Return a configuration (RTX only)."""
        if not self._module.rtx:
            raise AttributeError("'ICudaEngine' object has no attribute 'create_runtime_config'")
        return RuntimeConfig(self._module)

    def _spec(self, name: str) -> dict[str, Any]:
        if name not in self.tensors:
            raise StandinError(f"the engine is asked about {name}, which it does not have")
        spec: dict[str, Any] = self.tensors[name]["spec"]
        return spec


class RuntimeCache:
    """`IRuntimeCache`: which plans were compiled for this device."""

    def __init__(self, module: _Module) -> None:
        self._module = module
        self.compiled: list[str] = []

    def serialize(self) -> memoryview:
        """Return it as memory."""
        return memoryview(json.dumps([self._origin(), self.compiled]).encode())

    def deserialize(self, blob: Any) -> bool:
        """Take what was compiled earlier on the same device by the same version."""
        try:
            origin, compiled = json.loads(bytes(blob))
        except ValueError:
            return False
        if origin != self._origin():
            return False
        self.compiled = compiled
        return True

    def _origin(self) -> list[Any]:
        cuda = self._module.cuda
        return [self._module.version, cuda.device_name, list(cuda.compute_capability)]


class RuntimeConfig:
    """`IRuntimeConfig`."""

    def __init__(self, module: _Module) -> None:
        self._module = module
        self.strategy = ExecutionContextAllocationStrategy.STATIC
        self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
        strategies = DynamicShapesKernelSpecializationStrategy
        self.dynamic_shapes_kernel_specialization_strategy = strategies.LAZY
        self.cache: RuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        """Say who allocates activation memory."""
        self.strategy = ExecutionContextAllocationStrategy(strategy)

    def create_runtime_cache(self) -> RuntimeCache:
        """Return an empty cache."""
        return RuntimeCache(self._module)

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        """Use a cache."""
        self.cache = cache
        return True


class ExecutionContext:
    """`IExecutionContext`."""

    def __init__(
        self,
        module: _Module,
        logger: ILogger,
        engine: CudaEngine,
        strategy: ExecutionContextAllocationStrategy,
        config: RuntimeConfig | None,
    ) -> None:
        self._module, self._logger, self._engine = module, logger, engine
        self._strategy, self._config = strategy, config
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory: Span = (0, 0)
        self._settled = False  # whether a run has carried out what new shapes put off
        module.contexts.append(engine.plan["component"])

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        """Choose a profile."""
        if profile_index != 0 or not self._module.cuda.knows_stream(stream_handle):
            return self._refuse(f"setOptimizationProfileAsync: profile {profile_index}")
        return True

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        """Set an input's shape, inside the profile."""
        if not isinstance(shape, tuple | list | Dims):
            raise TypeError("set_input_shape(): incompatible function arguments")
        if name not in self._engine.input_names:
            return self._refuse(f"setInputShape: {name} is no input")
        least, _, most = self._engine.tensors[name]["profile"]
        if len(shape) != len(least):
            return self._refuse(f"setInputShape: {name} has {len(least)} dimensions")
        for size, low, high in zip(shape, least, most, strict=True):
            if not low <= size <= high:
                return self._refuse(f"setInputShape: {name} {tuple(shape)} is outside the profile")
        if self._shapes.get(name) != tuple(shape):
            self._shapes[name] = tuple(shape)
            self._settled = False
        return True

    def get_tensor_shape(self, name: str) -> Dims:
        """Return a tensor's shape, -1 where input shapes do not settle it yet."""
        if name in self._shapes:
            return Dims(self._shapes[name])
        sizes = self._sizes()
        shape = self._engine._spec(name)["shape"]
        return Dims([size if isinstance(size, int) else sizes.get(size, -1) for size in shape])

    def set_tensor_address(self, name: str, memory: int) -> bool:
        """Say where a tensor lies."""
        if name not in self._engine.tensors:
            return self._refuse(f"setTensorAddress: no tensor {name}")
        if memory % ALIGNMENT:
            return self._refuse(f"setTensorAddress: {name} is not aligned to {ALIGNMENT} bytes")
        self._addresses[name] = int(memory)
        return True

    def infer_shapes(self) -> list[str]:
        """Name the inputs without a shape; fail where shapes contradict each other."""
        missing = [name for name in self._engine.input_names if name not in self._shapes]
        if not missing:
            self._sizes()
        return missing

    def update_device_memory_size_for_shapes(self) -> int:
        """Return the bytes of activation memory that the shapes need."""
        if self.infer_shapes():
            raise StandinError("the size of activation memory is asked for before all shapes")
        return self._need()

    def set_device_memory(self, memory: int, size: int) -> None:
        """Give activation memory."""
        if self._strategy != ExecutionContextAllocationStrategy.USER_MANAGED:
            self._refuse("setDeviceMemory: the context allocates its own")
        elif memory % ALIGNMENT:
            self._refuse(f"setDeviceMemory: not aligned to {ALIGNMENT} bytes")
        else:
            self._memory = (int(memory), size)

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Queue a run."""
        cuda = self._module.cuda
        why = self._why_not(stream_handle)
        if why:
            return self._refuse(f"enqueueV3: {why}")
        inputs, outputs = (
            {name: self._span(name) for name in names}
            for names in (self._engine.input_names, self._engine.output_names)
        )
        _refuse_overlaps(inputs, {**outputs, "activation memory": self._memory})
        self._compile()
        fallback = self._is_fallback()
        self._settled = True
        spans = (*inputs.values(), *outputs.values())
        if self._memory[1]:
            spans = (*spans, self._memory)
        shapes = {name: tuple(self.get_tensor_shape(name)) for name in self._engine.tensors}
        run = partial(self._compute, inputs, outputs, shapes, self._memory, fallback)
        cuda.enqueue(stream_handle, Work(name=self._engine.plan["component"], run=run, spans=spans))
        return True

    def _why_not(self, stream: int) -> str:
        cuda = self._module.cuda
        if not cuda.knows_stream(stream):
            return "no such stream"
        if not self._engine.refitted:
            return "the engine was stripped of its weights and not refitted"
        missing = self.infer_shapes()
        if missing:
            return f"no shape for {', '.join(missing)}"
        for name in self._engine.tensors:
            if not self._addresses.get(name):
                return f"no address for {name}"
        if self._strategy == ExecutionContextAllocationStrategy.USER_MANAGED and (
            not self._memory[0] or self._memory[1] < self._need()
        ):
            return f"{self._need()} bytes of activation memory needed, {self._memory[1]} given"
        if cuda.is_capturing(stream):
            if self._captures_itself():
                return "the stream is captured and so would be the run"
            if not self._settled:
                return "a first run with new shapes cannot be captured"
        return ""

    def _captures_itself(self) -> bool:
        return (
            self._config is not None
            and self._config.cuda_graph_strategy == CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        )

    def _compile(self) -> None:
        """Compile as TensorRT-RTX does at the first run, unless the cache has it."""
        if not self._module.rtx or self._settled:
            return
        digest = self._engine.plan["digest"]
        cache = self._config.cache if self._config is not None else None
        if cache is not None and digest in cache.compiled:
            return
        self._module.compiled.append(self._engine.plan["component"])
        if cache is not None:
            cache.compiled.append(digest)

    def _is_fallback(self) -> bool:
        """Whether TensorRT-RTX would still be compiling, and run kernels for any shapes."""
        eager = DynamicShapesKernelSpecializationStrategy.EAGER
        return self._config is not None and (
            self._config.dynamic_shapes_kernel_specialization_strategy != eager
            and not self._settled
        )

    def _compute(
        self,
        inputs: Mapping[str, Span],
        outputs: Mapping[str, Span],
        shapes: Mapping[str, tuple[int, ...]],
        memory: Span,
        fallback: bool,
    ) -> None:
        cuda, plan = self._module.cuda, self._engine.plan
        if memory[1]:
            cuda.view(*memory)[:] = POISON  # whatever lay there is gone
        feeds = {
            name: cuda.view(*span).copy().view(self._dtype(name)).reshape(shapes[name])
            for name, span in inputs.items()
        }
        found = _session(plan["digest"], plan["graph"]).run(feeds)
        for name, span in outputs.items():
            array = np.ascontiguousarray(found[name])
            if fallback and array.dtype == np.float32:
                array = np.nextafter(array, np.float32(np.inf))  # other kernels give other bits
            if (array.shape, array.dtype) != (shapes[name], self._dtype(name)):
                raise StandinError(f"{name}: {array.dtype} {array.shape}, not {shapes[name]}")
            cuda.view(*span)[:] = array.reshape(-1).view(np.uint8)

    def _span(self, name: str) -> Span:
        nbytes = prod(self.get_tensor_shape(name)) * self._dtype(name).itemsize
        try:
            self._module.cuda.view(self._addresses[name], nbytes)
        except StandinError as error:
            raise StandinError(f"{name}: {error}") from None
        return self._addresses[name], nbytes

    def _dtype(self, name: str) -> np.dtype[Any]:
        dtype: np.dtype[Any] = np.dtype(self._engine._spec(name)["dtype"])
        return dtype

    def _sizes(self) -> dict[str, int]:
        """Size of every named dimension that the input shapes settle."""
        sizes: dict[str, int] = {}
        for name, shape in self._shapes.items():
            for dimension, size in zip(self._engine._spec(name)["shape"], shape, strict=True):
                if isinstance(dimension, str) and sizes.setdefault(dimension, size) != size:
                    raise RuntimeError(f"dimension {dimension} is {sizes[dimension]} and {size}")
        cell = self._engine.plan["downscale"]
        for pixels, cells in (("H", "h"), ("W", "w")):
            if cells in sizes:
                sizes.setdefault(pixels, sizes[cells] * cell)
            elif pixels in sizes:
                sizes[cells] = sizes[pixels] // cell
        if sizes.get("K*B", 0) % sizes.get("B", 1):
            raise RuntimeError(f"{sizes['K*B']} branches of {sizes['B']} images")
        return sizes

    def _need(self) -> int:
        """Any number that grows with the shapes will do."""
        return ALIGNMENT * (1 + sum(map(prod, self._shapes.values())) // 64)

    def _refuse(self, why: str) -> bool:
        self._logger.log(Severity.ERROR, why)
        return False


class Refitter:
    """Puts weights into a stripped engine (classic TensorRT)."""

    def __init__(self, engine: CudaEngine, logger: ILogger) -> None:
        if "strip_weights" not in engine.plan["options"]:
            raise TypeError("the engine was not built to be refitted")
        self.engine, self.logger = engine, _checked(logger)
        self.filled = False

    def get_missing_weights(self) -> list[str]:
        """Name weights that are still missing."""
        return [] if self.filled else [f"{self.engine.plan['component']}.weight"]

    def refit_cuda_engine(self) -> bool:
        """Carry it out."""
        self.engine.refitted = self.engine.refitted or self.filled
        return self.filled


class OnnxParserRefitter:
    """Finds the weights in an ONNX file (classic TensorRT)."""

    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        self._refitter, self._logger = refitter, _checked(logger)

    def refit_from_file(self, model_file: str) -> bool:
        """Take the weights of the graph that the plan was built from, and of no other."""
        if not isinstance(model_file, str):
            raise TypeError("refit_from_file(): incompatible function arguments")
        path = Path(model_file)
        wanted = self._refitter.engine.plan["weights_sha256"]
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != wanted:
            self._logger.log(Severity.ERROR, f"refitFromFile: {model_file} does not fit")
            return False
        self._refitter.filled = True
        return True


class TensorRTModule(ModuleType):
    """`tensorrt` or `tensorrt_rtx`; `compiled` tells what was compiled, in order (RTX)."""

    compiled: list[str]
    shared: _Module
    # What both flavours have; the rest is set in `make_tensorrt`.
    ILogger = ILogger
    TensorIOMode = TensorIOMode
    DataType = DataType
    Dims = Dims
    ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
    only_rtx: ClassVar[dict[str, Any]] = {
        "CudaGraphStrategy": CudaGraphStrategy,
        "DynamicShapesKernelSpecializationStrategy": DynamicShapesKernelSpecializationStrategy,
        "ComputeCapability": IntEnum(
            "ComputeCapability",
            {"NONE": 0, "CURRENT": 1, **{f"SM{number}": int(number) for number in _CAPABILITIES}},
        ),
    }
    only_classic: ClassVar[dict[str, Any]] = {
        "Refitter": Refitter,
        "OnnxParserRefitter": OnnxParserRefitter,
    }

    def nptype(self, trt_type: Any) -> type:
        """Return NumPy's type."""
        if trt_type not in _DTYPES:
            raise TypeError(f"NumPy has no {trt_type!r}")
        return _DTYPES[trt_type]


def make_tensorrt(flavour: Flavour, version: str, cuda: FakeCuda) -> TensorRTModule:
    """Return a pretended TensorRT of a flavour and version, on a pretended device."""
    shared = _Module(flavour, version, cuda)
    module = TensorRTModule(flavour.replace("-", "_"))
    own = module.only_rtx if shared.rtx else module.only_classic
    module.__dict__.update(
        own,
        __version__=version,
        compiled=shared.compiled,
        shared=shared,
        Runtime=partial(Runtime, shared),
    )
    return module


@cache
def _session(digest: str, graph: str) -> OrtEngine:
    """Return the CPU pipeline's own engine of a graph."""
    return prepared_engine(digest, lambda: Path(graph))


def _plan(data: bytes) -> Mapping[str, Any] | None:
    try:
        plan = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return plan if isinstance(plan, dict) and plan.get("magic") == MAGIC else None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _checked(logger: ILogger) -> ILogger:
    if not isinstance(logger, ILogger) or not hasattr(logger, "_constructed"):
        raise TypeError("ILogger.__init__() must be called when overriding __init__")
    return logger


def _refuse_overlaps(inputs: Mapping[str, Span], written: Mapping[str, Span]) -> None:
    """TensorRT reads inputs while it writes; two inputs may share their memory."""
    pairs: Iterator[Any] = iter(
        [*product(inputs.items(), written.items()), *combinations(written.items(), 2)]
    )
    for (name, (start, size)), (other, (begin, length)) in pairs:
        if start < begin + length and begin < start + size:
            raise StandinError(f"{name} and {other} overlap")
