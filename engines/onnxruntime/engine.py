"""ONNX Runtime as an engine, on the CPU and on CUDA."""

from __future__ import annotations

import os
import weakref
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np

from sld_edge.engines.base import Array, TensorSpec, check_tensors
from sld_edge.engines.cache import private_folder
from sld_edge.engines.cuda.device import Device
from sld_edge.engines.errors import EngineError, MissingPackageError, one_line
from sld_edge.engines.settings import thread_count

OrtProvider = Literal["cpu", "cuda", "ort-tensorrt", "ort-tensorrt-rtx"]
PROVIDERS: Mapping[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "ort-tensorrt": "TensorrtExecutionProvider",
    "ort-tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
_HEAVY = {"Attention", "Conv", "Gemm", "MatMul"}  # where nearly all of the time goes
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


def onnxruntime() -> ModuleType:
    """Import ONNX Runtime, or say how to install it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingPackageError("onnxruntime", extra="cpu", why="running a graph") from error
    module: ModuleType = onnxruntime
    return module


def provider_options(provider: OrtProvider, device: Device | None) -> dict[str, str]:
    """Return a provider's options: its stream, and the folder for the kernels it compiles."""
    if device is None:
        return {}
    options = {"user_compute_stream": str(device.stream)}
    root = private_folder(provider) if provider.startswith("ort-") else None
    if provider == "cuda":
        # A search for the fastest convolutions would take minutes; TF32 would lose digits.
        options |= {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}
    elif provider == "ort-tensorrt" and root is not None:
        folder = str(root)
        options |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": folder}
        options |= {"trt_timing_cache_enable": "1", "trt_timing_cache_path": folder}
    elif provider == "ort-tensorrt-rtx" and root is not None:
        options |= {"has_user_compute_stream": "1", "nv_runtime_cache_path": str(root)}
    return options


class OrtEngine:
    """A graph in ONNX Runtime. `run` takes contiguous arrays without a copy; outputs are new."""

    def __init__(
        self,
        path: Path,
        *,
        provider: OrtProvider = "cpu",
        as_is: bool = False,
        prepared: bool = False,
        device: Device | None = None,
        lock: int | None = None,
    ) -> None:
        """Load a graph.

        Args:
            path: the ONNX file.
            provider: runs the graph.
            as_is: do not optimize the graph; its weights stay mapped from the file. It loads at
                once and in little memory, for graphs that run only once.
            prepared: `sessions` optimized the graph before; closing and loading it again is cheap.
            device: for a provider other than the CPU.
            lock: a handle that keeps other processes from removing the files; once loaded, the
                engine closes it when it is closed itself.

        Raises:
            EngineError: ONNX Runtime cannot load the graph here.
        """
        ort = onnxruntime()
        options = session_options()
        if as_is or prepared:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            # Prepacking would copy the mapped weights into memory.
            options.add_session_config_entry("session.disable_prepacking", "1")
        if as_is:
            # FP16 weights are cast just before their use, not all of them first.
            options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        # Without the arena every call asks the system for memory again, a fifth of a step's time.
        options.enable_cpu_mem_arena = prepared
        if provider != "cpu":
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        self.path = path
        self.prepared = prepared
        self.session = create_session(path, options, provider, device)
        self.heavy_on_cpu = {} if provider == "cpu" else heavy_on_cpu(self.session)
        self.inputs = tuple(map(_spec, self.session.get_inputs()))
        self.outputs = tuple(map(_spec, self.session.get_outputs()))
        self._output_names = [spec.name for spec in self.outputs]
        # Last: where loading fails, the caller closes the handle.
        self._unlock = weakref.finalize(self, os.close, lock) if lock is not None else None

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph once.

        Raises:
            EngineError: an input is missing, unknown or of another dtype or shape; or the run
                failed, for example out of memory.
        """
        check_tensors(self.path.name, self.inputs, feeds, kind="input")
        if self.session is None:
            raise EngineError(f"{self.path.name} was closed")
        try:
            values = self.session.run(self._output_names, dict(feeds))
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise EngineError(f"{self.path.name} failed to run", got=one_line(error)) from error
        return dict(zip(self._output_names, values, strict=True))

    def close(self) -> None:
        """Free the session's memory."""
        self.session = None
        if self._unlock is not None:
            self._unlock()

    def __enter__(self) -> OrtEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def session_options() -> Any:
    """Return the options that all sessions share."""
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors reach the user as EngineError, in one line
    options.intra_op_num_threads = thread_count()
    # With arena and pattern a session would keep the gigabytes of attention's scores.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    return options


def create_session(
    path: Path, options: Any, provider: OrtProvider, device: Device | None = None
) -> Any:
    """Create a session.

    Raises:
        EngineError: ONNX Runtime cannot load the graph, or cannot start the provider.
    """
    ort = onnxruntime()
    if provider != "cpu" and hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA and cuDNN from pip
    providers: list[Any] = [(PROVIDERS[provider], provider_options(provider, device))]
    if provider.startswith("ort-"):
        providers.append((PROVIDERS["cuda"], provider_options("cuda", device)))
    if provider != "cpu":
        providers.append(PROVIDERS["cpu"])
    try:
        session = ort.InferenceSession(
            os.fspath(path), options, providers=providers, enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise EngineError(
            f"ONNX Runtime {ort.__version__} cannot load {path}",
            got=one_line(error),
            do="export the bundle again, or update onnxruntime",
        ) from error
    if PROVIDERS[provider] not in session.get_providers():
        # ONNX Runtime goes on without the provider, in silence.
        raise EngineError(
            f"ONNX Runtime {ort.__version__} could not start {PROVIDERS[provider]} here",
            got="a package, driver or library that it needs is missing or too old",
            do="see sld-run --providers, or use --provider cpu",
        )
    return session


def heavy_on_cpu(session: Any) -> dict[str, int]:
    """Return the operators that another provider left to the CPU, and how many nodes of each.

    ONNX Runtime gives the CPU, in silence, what a provider has no kernel for. Versions before 1.24
    do not tell; then nothing is returned.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return {}
    return dict(
        Counter(
            node.op_type
            for part in session.get_provider_graph_assignment_info()
            if part.ep_name == PROVIDERS["cpu"]
            for node in part.get_nodes()
            if node.op_type in _HEAVY
        )
    )


def _spec(argument: Any) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else (size or "?") for size in argument.shape)
    dtype = _DTYPES.get(argument.type, argument.type)
    return TensorSpec(name=argument.name, dtype=np.dtype(dtype).name, shape=shape)
