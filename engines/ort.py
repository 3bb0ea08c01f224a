"""ONNX Runtime as an engine, on the CPU and on CUDA."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, Self

import numpy as np

from sld_edge.engines.base import Array, TensorSpec
from sld_edge.engines.errors import EngineError, InputError, MissingPackageError
from sld_edge.engines.settings import thread_count

Provider = Literal["cpu", "cuda"]
PROVIDERS: Mapping[str, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
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


def resolve_provider(name: str) -> Provider:
    """Turn what the user asked for into what runs here; "auto" takes CUDA where it works.

    Raises:
        InputError: unknown provider, or one that this ONNX Runtime does not have.
    """
    available = onnxruntime().get_available_providers()
    if name == "auto":
        return "cuda" if PROVIDERS["cuda"] in available else "cpu"
    if name not in PROVIDERS:
        raise InputError(
            "provider", got=repr(name), expected="one of " + ", ".join(("auto", *PROVIDERS))
        )
    if PROVIDERS[name] not in available:
        raise InputError(
            f"provider {name} is not in the installed ONNX Runtime",
            do='pip install "sld-edge[gpu]" in place of onnxruntime, or use --provider cpu',
        )
    return "cuda" if name == "cuda" else "cpu"


class OrtEngine:
    """A graph in ONNX Runtime. `run` takes contiguous arrays without a copy; outputs are new."""

    def __init__(self, path: Path, *, provider: Provider = "cpu", as_is: bool = False) -> None:
        """Load the graph at `path`.

        With `as_is` nothing is optimized and the weights stay mapped from the file: ready at once,
        in little memory. It is for graphs optimized before (see `sessions`) or run only once.

        Raises:
            EngineError: ONNX Runtime cannot load the graph here.
        """
        ort = onnxruntime()
        options = session_options()
        if as_is:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            # Prepacked weights would be copies in memory of what is mapped from the file.
            options.add_session_config_entry("session.disable_prepacking", "1")
        self.path = path
        self._session = create_session(path, options, provider)
        self.inputs = tuple(map(_spec, self._session.get_inputs()))
        self.outputs = tuple(map(_spec, self._session.get_outputs()))
        self._output_names = [spec.name for spec in self.outputs]

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph once.

        Raises:
            EngineError: an input is missing, unknown or of another dtype or shape; or the run
                failed, out of memory for example.
        """
        self._check(feeds)
        try:
            values = self._session.run(self._output_names, dict(feeds))
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise EngineError(f"{self.path.name} failed to run", got=_first_line(error)) from error
        return dict(zip(self._output_names, values, strict=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._session = None

    def _check(self, feeds: Mapping[str, Array]) -> None:
        for spec in self.inputs:
            array = feeds.get(spec.name)
            if array is None or not spec.accepts(array):
                raise EngineError(
                    f"{self.path.name}: input {spec.name}",
                    got="nothing" if array is None else f"{array.dtype} {list(array.shape)}",
                    expected=f"{spec.dtype} {list(spec.shape)}",
                )
        if len(feeds) != len(self.inputs):
            unknown = sorted(set(feeds) - {spec.name for spec in self.inputs})
            raise EngineError(f"{self.path.name}: no such input", got=", ".join(unknown))


def session_options() -> Any:
    """Return the session options that every session here shares."""
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors; they reach the user as EngineError
    options.intra_op_num_threads = thread_count()
    # With arena and pattern a session keeps gigabytes that it needed once (FACTS, "Speed").
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    return options


def create_session(path: Path, options: Any, provider: Provider) -> Any:
    """Create a session; whatever stops it becomes one line."""
    ort = onnxruntime()
    providers: Sequence[str] = [PROVIDERS[provider]]
    if provider != "cpu":
        providers = [*providers, PROVIDERS["cpu"]]
    try:
        return ort.InferenceSession(os.fspath(path), options, providers=providers)
    except Exception as error:  # ONNX Runtime's errors share no base class
        raise EngineError(
            f"ONNX Runtime {ort.__version__} cannot load {path}",
            got=_first_line(error),
            do="export the bundle again, or update onnxruntime",
        ) from error


def _spec(argument: Any) -> TensorSpec:
    shape = tuple(size if isinstance(size, int) else (size or "?") for size in argument.shape)
    dtype = _DTYPES.get(argument.type, argument.type)
    return TensorSpec(name=argument.name, dtype=np.dtype(dtype).name, shape=shape)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
