"""OpenVINO as an engine."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sld_edge.engines.base import Array, TensorSpec, check_tensors
from sld_edge.engines.errors import EngineError, one_line
from sld_edge.engines.openvino.api import core, read_model, version
from sld_edge.engines.openvino.pages import release_pages
from sld_edge.engines.openvino.target import Target


class OpenVinoEngine:
    """A graph in OpenVINO. `run` takes contiguous arrays without a copy; outputs are new.

    A graph compiled for fixed sizes is faster, but compiling takes seconds. So a large graph is
    compiled at its first run, and again only where the sizes of its inputs change.
    """

    def __init__(self, path: Path, target: Target, *, fixed: bool, lock: int | None = None) -> None:
        """Load a graph.

        Args:
            path: the graph, ONNX or OpenVINO's own format.
            target: where and how it runs.
            fixed: compile it for the sizes of its inputs.
            lock: a handle that keeps other processes from removing the files; once loaded, the
                engine closes it when it is closed itself.

        Raises:
            EngineError: OpenVINO cannot load the graph here.
        """
        self.path = path
        self._target, self._fixed = target, fixed
        self._model = read_model(path)
        self.inputs = tuple(map(_spec, self._model.inputs))
        self.outputs = tuple(map(_spec, self._model.outputs))
        self._request: Any = None
        self._sizes: dict[str, tuple[int, ...]] = {}
        if not fixed:
            self._compile({})
        # Last: where loading fails, the caller closes the handle.
        self._unlock = weakref.finalize(self, os.close, lock) if lock is not None else None

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph once.

        Raises:
            EngineError: an input is missing, unknown or of another dtype or shape; or the run
                failed, for example out of memory.
        """
        check_tensors(self.path.name, self.inputs, feeds, kind="input")
        if self._model is None:
            raise EngineError(f"{self.path.name} was closed")
        sizes = {name: array.shape for name, array in feeds.items()}
        self.compile(sizes)
        try:
            values = self._request.infer(
                {name: np.ascontiguousarray(array) for name, array in feeds.items()},
                share_inputs=True,
            )
            return {spec.name: values[index] for index, spec in enumerate(self.outputs)}
        except Exception as error:  # OpenVINO's errors share no base class
            raise EngineError(f"{self.path.name} failed to run", got=one_line(error)) from error

    def compile(self, sizes: Mapping[str, tuple[int, ...]]) -> None:
        """Compile a graph of fixed sizes for these shapes of its inputs, if it is not yet.

        Raises:
            EngineError: OpenVINO cannot compile the graph, for example out of memory.
        """
        if self._fixed and sizes != self._sizes:
            self._compile(sizes)

    def close(self) -> None:
        """Free the graph's memory."""
        self._request = self._model = None
        if self._unlock is not None:
            self._unlock()

    def __enter__(self) -> OpenVinoEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _compile(self, sizes: Mapping[str, tuple[int, ...]]) -> None:
        self._request, self._sizes = None, {}  # frees the memory of other sizes first
        try:
            if sizes:
                self._model.reshape({name: list(shape) for name, shape in sizes.items()})
            compiled = core().compile_model(
                self._model, self._target.device, self._target.settings()
            )
            self._request = compiled.create_infer_request()
        except Exception as error:  # OpenVINO's errors share no base class
            raise EngineError(
                f"OpenVINO {version()} cannot compile {self.path.name} for {self._target.device}",
                got=one_line(error),
                do="see sld-run --self-test --provider openvino, or use --provider cpu",
            ) from error
        self._sizes = dict(sizes)
        # OpenVINO keeps weights in its own layout and does not read the file again.
        release_pages(self.path.with_suffix(".bin"))


def _spec(port: Any) -> TensorSpec:
    """Return a tensor's specification; a size that is known only at run time is "?"."""
    shape = tuple(size.get_length() if size.is_static else "?" for size in port.get_partial_shape())
    dtype = np.dtype(port.get_element_type().to_dtype()).name
    return TensorSpec(name=port.get_any_name(), dtype=dtype, shape=shape)
