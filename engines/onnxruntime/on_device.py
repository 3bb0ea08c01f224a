"""ONNX Runtime on a device: its tensors stay there, bound by address, on the device's stream."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sld_edge.engines.base import Array, TensorSpec, check_tensors
from sld_edge.engines.cuda.device import Device, DeviceTensor
from sld_edge.engines.errors import EngineError, one_line
from sld_edge.engines.onnxruntime.engine import OrtEngine, OrtProvider, onnxruntime


class OrtDeviceEngine:
    """A graph in ONNX Runtime on a CUDA device."""

    capturable = False  # the session allocates while it runs

    def __init__(self, path: Path, device: Device, *, provider: OrtProvider) -> None:
        """Load the graph at `path`.

        Raises:
            EngineError: ONNX Runtime cannot load the graph here.
        """
        self.device = device
        self._engine = OrtEngine(path, provider=provider, device=device)
        self.heavy_on_cpu = self._engine.heavy_on_cpu
        self.path = path
        self.inputs: tuple[TensorSpec, ...] = self._engine.inputs
        self.outputs: tuple[TensorSpec, ...] = self._engine.outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph once, from host arrays to new host arrays; see `OrtEngine.run`."""
        return self._engine.run(feeds)

    def bind(self, tensors: Mapping[str, DeviceTensor]) -> OrtBound:
        """Fix the shape and address of every input and output, by name.

        Raises:
            EngineError: a tensor is missing or unknown, or of another dtype or shape.
        """
        check_tensors(self.path.name, (*self.inputs, *self.outputs), tensors, kind="tensor")
        session = self._engine.session
        binding = session.io_binding()
        for specs, bind in (
            (self.inputs, binding.bind_input),
            (self.outputs, binding.bind_output),
        ):
            for name in (spec.name for spec in specs):
                tensor = tensors[name]
                bind(name, "cuda", 0, np.dtype(tensor.dtype), list(tensor.shape), tensor.address)
        return OrtBound(self.path.name, session, binding)

    def close(self) -> None:
        """Free the session's memory."""
        self._engine.close()

    def __enter__(self) -> OrtDeviceEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class OrtBound:
    """A session with shapes and addresses."""

    def __init__(self, name: str, session: Any, binding: Any) -> None:
        """Use `OrtDeviceEngine.bind`."""
        self._name, self._session, self._binding = name, session, binding
        self._options = onnxruntime().RunOptions()
        # Everything runs in order on one stream, so no wait is needed.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def enqueue(self) -> None:
        """Queue one run on the device's stream.

        Raises:
            EngineError: the run failed, for example out of memory.
        """
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise EngineError(f"{self._name} failed to run", got=one_line(error)) from error
