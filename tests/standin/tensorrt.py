"""TensorRT on the stand-in for CUDA: a fake plan names an ONNX graph, which ONNX Runtime computes.

It refuses what TensorRT refuses: with False or None and a line in the log, as TensorRT does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from standin.cuda import ALIGNMENT, FakeCuda, StandinError

from sld_edge.engines.plan_info import Flavour
from sld_edge.engines.sessions import prepared_engine

WORKSPACE_PER_CELL = 64  # bytes; any number that grows with the shapes


class Mode(IntEnum):
    """`TensorIOMode`."""

    NONE = 0
    INPUT = 1
    OUTPUT = 2


class Severity(IntEnum):
    """`ILogger.Severity`, whose members `ILogger` has too."""

    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    """Base of the user's logger."""

    Severity = Severity
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


def make_tensorrt(flavour: Flavour, version: str, cuda: FakeCuda) -> ModuleType:
    """Return a module-like stand-in for `tensorrt` or `tensorrt_rtx`."""
    module = ModuleType(flavour.replace("-", "_"))
    names: dict[str, Any] = {
        "__version__": version,
        "ILogger": ILogger,
        "TensorIOMode": Mode,
        "ExecutionContextAllocationStrategy": SimpleNamespace(
            STATIC="static", USER_MANAGED="user managed"
        ),
        "nptype": lambda dtype: np.dtype(dtype).type,
        "Runtime": lambda logger: _Runtime(logger, flavour, version, cuda),
    }
    if flavour == "tensorrt-rtx":
        members = {f"SM{number}": number for number in (75, 80, 86, 89, 120, 121)}
        names["ComputeCapability"] = IntEnum("ComputeCapability", members)
        names["CudaGraphStrategy"] = SimpleNamespace(DISABLED=0, WHOLE_GRAPH_CAPTURE=1)
    else:
        names["Refitter"] = _Refitter
        names["OnnxParserRefitter"] = _OnnxParserRefitter
    module.__dict__.update(names)
    return module


class _Runtime:
    def __init__(self, logger: ILogger, flavour: Flavour, version: str, cuda: FakeCuda) -> None:
        self._logger, self._flavour, self._version, self._cuda = logger, flavour, version, cuda
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
        try:
            body = json.loads(bytes(serialized_engine))
        except ValueError:
            return self._refuse("Serialization assertion failed: magic tag does not match")
        if body["engine"] != self._flavour:
            return self._refuse("the plan is of another product")
        if body["version_compatible"]:
            if not self.engine_host_code_allowed:
                return self._refuse("the plan holds host code, which is not allowed")
        elif body["version"] != self._version:
            return self._refuse(f"Version tag does not match: {body['version']}")
        return _Engine(body, self._logger, self._cuda)

    def _refuse(self, why: str) -> None:
        self._logger.log(Severity.ERROR, why)


class _Engine:
    def __init__(self, body: dict[str, Any], logger: ILogger, cuda: FakeCuda) -> None:
        self.body, self.logger, self.cuda = body, logger, cuda
        graph = Path(body["graph"])
        digest = hashlib.sha256(body["source_sha256"].encode()).hexdigest()
        # The session that the CPU pipeline runs, so that results are equal to the last bit.
        self.computes = prepared_engine(body.get("session", digest), lambda: graph)
        self.tensors = {**body["inputs"], **body["outputs"]}
        self.num_io_tensors = len(self.tensors)
        self.num_optimization_profiles = 1
        self.has_weights = not body["stripped"]

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.INPUT if name in self.body["inputs"] else Mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> str:
        return str(self.tensors[name]["dtype"])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(s if isinstance(s, int) else -1 for s in self.tensors[name]["shape"])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        assert profile_index == 0
        return [list(shape) for shape in self.body["inputs"][name]["profile"]]

    def create_execution_context(self, argument: Any, /) -> _Context:
        managed = getattr(argument, "strategy", argument) == "user managed"
        return _Context(self, managed=managed)

    def create_runtime_config(self) -> _RuntimeConfig:
        if self.body["engine"] != "tensorrt-rtx":
            raise AttributeError("create_runtime_config")
        return _RuntimeConfig(self.body)


class _RuntimeConfig:
    def __init__(self, body: dict[str, Any]) -> None:
        self.cuda_graph_strategy: Any = 0
        self.strategy: Any = "static"
        self._body = body

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> _RuntimeCache:
        return _RuntimeCache(self._body["source_sha256"])

    def set_runtime_cache(self, cache: _RuntimeCache) -> bool:
        return True


class _RuntimeCache:
    def __init__(self, source: str) -> None:
        self._blob = f"kernels of {source}".encode()
        self.known = False

    def serialize(self) -> bytes:
        return self._blob

    def deserialize(self, blob: bytes) -> bool:
        self.known = blob == self._blob
        return self.known


class _Refitter:
    def __init__(self, engine: _Engine, logger: ILogger) -> None:
        self.engine, self.logger = engine, logger
        self.source: Path | None = None

    def refit_cuda_engine(self) -> bool:
        self.engine.has_weights = self.source == Path(self.engine.body["graph"])
        return self.engine.has_weights

    def get_missing_weights(self) -> list[str]:
        return [] if self.engine.has_weights else ["conv_in.weight"]


class _OnnxParserRefitter:
    def __init__(self, refitter: _Refitter, logger: ILogger) -> None:
        self._refitter = refitter

    def refit_from_file(self, model_file: str) -> bool:
        self._refitter.source = Path(model_file)
        return Path(model_file).is_file()


class _Context:
    def __init__(self, engine: _Engine, *, managed: bool) -> None:
        self._engine, self._managed = engine, managed
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._memory = (0, 0)
        self._needs: int | None = None

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        return profile_index == 0

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        if name not in self._engine.body["inputs"]:
            return self._refuse(f"no input {name}")
        least, _, most = self._engine.get_tensor_profile_shape(name, 0)
        if len(shape) != len(least) or not all(
            low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
        ):
            return self._refuse(f"shape of {name} is outside the profile")
        self._shapes[name] = tuple(shape)
        self._needs = None
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        sizes: dict[str, int] = {}
        for own, shape in self._shapes.items():
            for key, size in zip(self._engine.tensors[own]["shape"], shape, strict=True):
                if isinstance(key, str) and sizes.setdefault(key, size) != size:
                    return ()
        cell = self._engine.body["downscale"]
        sizes |= {
            "H": sizes.get("H", sizes.get("h", 0) * cell),
            "W": sizes.get("W", sizes.get("w", 0) * cell),
        }
        sizes |= {"h": sizes.get("h", sizes["H"] // cell), "w": sizes.get("w", sizes["W"] // cell)}
        return tuple(
            size if isinstance(size, int) else sizes.get(size, -1)
            for size in self._engine.tensors[name]["shape"]
        )

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine.body["inputs"] if name not in self._shapes]

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine.tensors:
            return self._refuse(f"no tensor {name}")
        if memory % ALIGNMENT:
            raise StandinError(f"{name} is not aligned")
        self._addresses[name] = memory
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        if self.infer_shapes():
            raise StandinError("the memory is asked for before all shapes are set")
        cells = sum(int(np.prod(shape)) for shape in self._shapes.values())
        self._needs = cells * WORKSPACE_PER_CELL
        return self._needs

    def set_device_memory(self, memory: int, size: int) -> None:
        if memory % ALIGNMENT:
            raise StandinError("the workspace is not aligned")
        self._memory = (memory, size)

    def execute_async_v3(self, stream_handle: int) -> bool:
        engine = self._engine
        if self.infer_shapes():
            return self._refuse("not all shapes are set")
        missing = [name for name in engine.tensors if name not in self._addresses]
        if missing:
            return self._refuse(f"no address for {missing[0]}")
        if self._managed and (self._needs is None or self._memory[1] < self._needs):
            return self._refuse("the activation memory is too small or was not given")
        if not engine.has_weights:
            return self._refuse("weights are missing: refit first")
        places = {}
        for name, tensor in engine.tensors.items():
            shape = self.get_tensor_shape(name)
            nbytes = int(np.prod(shape)) * np.dtype(tensor["dtype"]).itemsize
            places[name] = (self._addresses[name], nbytes, shape)
        self._check_overlap(places)
        touches = tuple((address, nbytes) for address, nbytes, _ in places.values())
        engine.cuda.launch(stream_handle, lambda: self._compute(places), (*touches, self._memory))
        return True

    def _compute(self, places: dict[str, tuple[int, int, tuple[int, ...]]]) -> None:
        engine = self._engine

        def bytes_of(name: str) -> Any:
            address, nbytes, _ = places[name]
            return engine.cuda.view(address, nbytes)

        feeds = {
            name: bytes_of(name).view(tensor["dtype"]).reshape(places[name][2]).copy()
            for name, tensor in engine.body["inputs"].items()
        }
        for name, array in engine.computes.run(feeds).items():
            if array.shape != places[name][2]:
                raise StandinError(f"{name} has shape {array.shape}, not {places[name][2]}")
            bytes_of(name)[:] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        engine.cuda.view(*self._memory)[:] = 0xFF  # activations of others do not survive

    def _check_overlap(self, places: dict[str, tuple[int, int, tuple[int, ...]]]) -> None:
        outputs = [places[name][:2] for name in self._engine.body["outputs"]]
        others = [places[name][:2] for name in self._engine.body["inputs"]] + [self._memory]
        for index, (address, nbytes) in enumerate(outputs):
            for other, size in (*others, *outputs[index + 1 :]):
                if address < other + size and other < address + nbytes:
                    raise StandinError("an output overlaps another tensor or the workspace")

    def _refuse(self, why: str) -> bool:
        self._engine.logger.log(Severity.ERROR, why)
        return False
