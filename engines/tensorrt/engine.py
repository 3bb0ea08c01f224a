"""A TensorRT plan as an engine, for both flavours; its tensors can stay on the device.

`bind` fixes shapes and addresses once. Each run is then one call, without copy, allocation or wait.
`run` goes from host arrays to host arrays.
"""

from __future__ import annotations

import contextlib
import importlib
import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from sld_edge.engines.base import Array, TensorSpec, check_tensors
from sld_edge.engines.cache import JIT, entry_name, private_folder
from sld_edge.engines.cuda.device import ALIGNMENT, Arena, Device, DeviceTensor
from sld_edge.engines.errors import EngineError, MissingPackageError, OutputError, one_line
from sld_edge.engines.files import opened, read_limited, write_whole
from sld_edge.engines.tensorrt.api import CudaEngine, ExecutionContext, RtxCudaEngine, TensorRT
from sld_edge.engines.tensorrt.plan_info import Flavour, PlanInfo, named_shape

_MODULES: dict[Flavour, tuple[str, str]] = {
    "tensorrt": ("tensorrt", "tensorrt"),
    "tensorrt-rtx": ("tensorrt_rtx", "rtx"),
}
_JIT_LIMIT = 1 << 30  # bytes of compiled kernels
_KEPT_SHAPES = 4  # sets of input shapes whose buffers `run` keeps


def tensorrt_module(flavour: Flavour) -> TensorRT:
    """Import TensorRT of a flavour, or say how to install it.

    Raises:
        MissingPackageError: it is not installed.
        EngineError: it is installed, but its libraries are missing or do not load here.
    """
    name, extra = _MODULES[flavour]
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise MissingPackageError(name, extra=extra, why=f"provider {flavour}") from error
    except (ImportError, OSError) as error:
        raise EngineError(
            f"{name} is installed but does not load",
            got=one_line(error),
            do="see docs/engines.md",
        ) from error
    return cast(TensorRT, module)


class Log:
    """TensorRT's latest errors, because its calls return only None or False."""

    def __init__(self, trt: TensorRT, listen: Callable[[str], None] = lambda message: None) -> None:
        """Make `logger`, which TensorRT's classes take; `listen` gets all other messages."""
        self.lines: list[str] = []
        lines, severity = self.lines, trt.ILogger

        class Logger(trt.ILogger):  # type: ignore[misc, name-defined]  # TensorRT has no types
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, level: Any, message: str) -> None:
                if level in (severity.ERROR, severity.INTERNAL_ERROR):
                    lines.append(one_line(message))
                    del lines[:-20]
                else:
                    listen(message)

        self.logger: Any = Logger()

    def last(self) -> str:
        """Return the last error, or a text where there is none."""
        return self.lines[-1] if self.lines else "no reason given"


class TrtEngine:
    """A plan on a device."""

    def __init__(
        self,
        path: Path,
        info: PlanInfo,
        device: Device,
        *,
        cuda_graph: bool = True,
        source: Path | None = None,
    ) -> None:
        """Load a plan that was checked before (see `plan_info.misfit`).

        Args:
            path: the plan.
            info: its description.
            device: runs the plan.
            cuda_graph: whether runs may be replayed from a CUDA graph.
            source: the ONNX graph with the weights of a stripped plan.

        Raises:
            MissingPackageError: TensorRT is not installed.
            EngineError: TensorRT does not take the plan.
        """
        self._trt = trt = tensorrt_module(info.engine)
        self.path, self.info, self.device = path, info, device
        self._log = Log(trt)
        self._runtime = trt.Runtime(self._log.logger)
        if self._log.lines:  # a library without a usable driver gives an object that then crashes
            raise EngineError(
                f"{info.engine} {trt.__version__} does not start",
                got=self._log.last(),
                do="update the NVIDIA driver, or run with --provider cpu",
            )
        if info.options.get("version_compatible"):
            self._runtime.engine_host_code_allowed = True  # such a plan contains its own runtime
        self._closed = False
        self._engine = self._deserialize()
        if info.options.get("strip_weights"):
            self._refit(source)
        rtx = info.engine == "tensorrt-rtx"
        # TensorRT-RTX captures graphs itself: only it knows when a kernel was compiled again.
        self.capturable = cuda_graph and not rtx
        self._jit = _JitCache(self._engine, info, device, trt, cuda_graph) if rtx else None
        self._profiles: dict[str, tuple[tuple[int, ...], ...]] = {}
        inputs, outputs = [], []
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                inputs.append(self._spec(name))
                shapes = self._engine.get_tensor_profile_shape(name, 0)
                self._profiles[name] = tuple(tuple(shape) for shape in shapes)
            else:
                outputs.append(self._spec(name))
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)
        self._host_runs: dict[tuple[tuple[int, ...], ...], tuple[Arena, TrtBound]] = {}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the plan once, from host arrays to new host arrays.

        Raises:
            EngineError: an input is missing, unknown, of another dtype, or of a shape that the
                plan was not built for; or the run failed.
        """
        self._require_open()
        check_tensors(self.path.name, self.inputs, feeds, kind="input")
        key = tuple(feeds[spec.name].shape for spec in self.inputs)
        if key not in self._host_runs:
            if len(self._host_runs) >= _KEPT_SHAPES:
                self._host_runs.pop(next(iter(self._host_runs)))[0].close()
            self._host_runs[key] = self._host_run(feeds)
        arena, bound = self._host_runs[key]
        for spec in self.inputs:
            self.device.upload(arena[spec.name], feeds[spec.name])
        bound.enqueue()
        return {spec.name: self.device.download(arena[spec.name]) for spec in self.outputs}

    def bind(self, tensors: Mapping[str, DeviceTensor]) -> TrtBound:
        """Fix the shape and address of every input and output, by name.

        Raises:
            EngineError: a tensor is missing or unknown, of another dtype or shape, not aligned, or
                outside the sizes that the plan was built for.
        """
        self._require_open()
        shapes = {
            spec.name: tensors[spec.name].shape for spec in self.inputs if spec.name in tensors
        }
        return self._attach(self._context(shapes), tensors)

    def save_kernels(self) -> None:
        """Save new kernels of TensorRT-RTX, also while it runs: a killed program keeps them."""
        if self._jit is not None:
            self._jit.save()

    @property
    def kernel_file(self) -> Path | None:
        """The file of the kernels that TensorRT-RTX compiled here; None where none is kept."""
        return None if self._jit is None else self._jit._path

    def close(self) -> None:
        """Free the plan's memory and save the kernels that were compiled for it."""
        if self._closed:
            return
        self._closed = True
        for arena, _ in self._host_runs.values():
            arena.close()
        self._host_runs.clear()
        self.save_kernels()
        self._jit = None
        del self._engine, self._runtime

    def __enter__(self) -> TrtEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._closed:
            raise EngineError(f"{self.path.name} was closed")

    def _deserialize(self) -> CudaEngine:
        try:
            with (
                opened(self.path) as stream,
                mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
            ):
                engine: CudaEngine | None = self._runtime.deserialize_cuda_engine(data)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise EngineError(f"cannot read {self.path}", got=one_line(error)) from error
        if engine is None:
            raise EngineError(
                f"{self.info.engine} {self._trt.__version__} does not take {self.path}",
                got=self._log.last(),
                do="build it again here with sld-build, or run with --provider cpu",
            )
        return engine

    def _refit(self, source: Path | None) -> None:
        if source is None:
            raise EngineError(
                f"{self.path} holds no weights and its ONNX graph is not here",
                do="copy the whole bundle, or build the plan without --strip-weights",
            )
        refitter = self._trt.Refitter(self._engine, self._log.logger)
        parser = self._trt.OnnxParserRefitter(refitter, self._log.logger)
        if not parser.refit_from_file(str(source)) or not refitter.refit_cuda_engine():
            missing = list(refitter.get_missing_weights())
            raise EngineError(
                f"{self.path.name}: the weights of {source.name} do not fit the plan",
                got=f"nothing for {', '.join(missing[:3])}" if missing else self._log.last(),
                do="build the plan again with sld-build",
            )

    def _spec(self, name: str) -> TensorSpec:
        shape = self._engine.get_tensor_shape(name)
        return TensorSpec(
            name=name,
            dtype=np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name))).name,
            shape=named_shape(name, shape, self.info.inputs + self.info.outputs),
        )

    def _context(self, shapes: Mapping[str, Sequence[int]]) -> ExecutionContext:
        """Return a new context with a shape for every input."""
        strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
        argument = strategy if self._jit is None else self._jit.config
        context = self._engine.create_execution_context(argument)
        if context is None:
            raise EngineError(
                f"{self.path.name}: no execution context",
                got=self._log.last(),
                do="free device memory, or run with --low-memory",
            )
        context.set_optimization_profile_async(0, self.device.stream)
        for name, shape in shapes.items():
            self._check_profile(name, shape)
            if not context.set_input_shape(name, tuple(shape)):
                raise EngineError(f"{self.path.name}: input {name}", got=self._log.last())
        try:
            missing = context.infer_shapes()
        except RuntimeError as error:  # raised by TensorRT's bindings for shapes that clash
            given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            raise EngineError(f"{self.path.name}: shapes do not fit together", got=given) from error
        if missing:
            raise EngineError(f"{self.path.name}: no shape for {', '.join(missing)}")
        return context

    def _check_profile(self, name: str, shape: Sequence[int]) -> None:
        least, _, most = self._profiles[name]
        if len(shape) != len(least) or not all(
            low <= size <= high for low, size, high in zip(least, shape, most, strict=True)
        ):
            raise EngineError(
                f"{self.path.name}: shape of {name}",
                got=list(shape),
                expected=f"{list(least)} to {list(most)}, which the plan was built for",
                do="choose another size or batch, build the plan with other --size and --batch, or "
                "run with --provider cpu",
            )

    def _attach(self, context: ExecutionContext, tensors: Mapping[str, DeviceTensor]) -> TrtBound:
        specs = (*self.inputs, *self.outputs)
        fixed = tuple(
            replace(spec, shape=tuple(context.get_tensor_shape(spec.name))) for spec in specs
        )
        check_tensors(self.path.name, fixed, tensors, kind="tensor")
        for spec in specs:
            tensor = tensors[spec.name]
            if tensor.address % ALIGNMENT:
                raise EngineError(
                    f"{self.path.name}: {spec.name} is not aligned to {ALIGNMENT} bytes",
                    do="choose a width and height that are multiples of 32",
                )
            if not context.set_tensor_address(spec.name, tensor.address):
                raise EngineError(f"{self.path.name}: tensor {spec.name}", got=self._log.last())
        bound = TrtBound(self, context)
        self.device.workspace.require(bound.nbytes)
        return bound

    def _host_run(self, feeds: Mapping[str, Array]) -> tuple[Arena, TrtBound]:
        """Return buffers for all inputs and outputs, and the plan bound to them."""
        context = self._context({spec.name: feeds[spec.name].shape for spec in self.inputs})
        layout = {
            spec.name: (spec.dtype, tuple(context.get_tensor_shape(spec.name)))
            for spec in (*self.inputs, *self.outputs)
        }
        arena = Arena(self.device, layout)
        try:
            bound = self._attach(context, {name: arena[name] for name in layout})
        except EngineError:
            arena.close()
            raise
        return arena, bound


class TrtBound:
    """A plan with shapes, addresses and activation memory."""

    def __init__(self, engine: TrtEngine, context: ExecutionContext) -> None:
        """Use `TrtEngine.bind`."""
        self._engine, self._context = engine, context
        self._generation, self._ran = 0, False
        self.nbytes = max(1, context.update_device_memory_size_for_shapes())

    def enqueue(self) -> None:
        """Queue one run on the device's stream.

        Raises:
            EngineError: the run failed, or there is no memory for it.
        """
        device = self._engine.device
        device.workspace.require(self.nbytes)  # gone where another plan ran out of memory
        if self._generation != device.workspace.generation:
            self._context.set_device_memory(device.workspace.address, device.workspace.nbytes)
            self._generation = device.workspace.generation
        if not self._context.execute_async_v3(device.stream):
            raise EngineError(
                f"{self._engine.path.name}: TensorRT did not run it", got=self._engine._log.last()
            )
        if not self._ran:
            self._ran = True
            self._engine.save_kernels()


class _JitCache:
    """The kernels that TensorRT-RTX compiled for this device, stored in a file between runs."""

    def __init__(
        self, engine: CudaEngine, info: PlanInfo, device: Device, trt: TensorRT, cuda_graph: bool
    ) -> None:
        self.config = cast(RtxCudaEngine, engine).create_runtime_config()
        self.config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        # Otherwise the first images come from other kernels, so from other bits, than later ones,
        # and a thread of TensorRT's compiles and logs while contexts are destroyed.
        strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        self.config.dynamic_shapes_kernel_specialization_strategy = strategy
        if cuda_graph:
            self.config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._cache = self.config.create_runtime_cache()
        root = private_folder(JIT)
        name = entry_name(info.sha256, trt.__version__, device.name, device.driver)
        self._path = root / f"{name}.cache" if root is not None else None
        self._stored = b""
        if self._path is not None:
            with contextlib.suppress(EngineError):
                self._stored = read_limited(self._path, _JIT_LIMIT, error=EngineError)
                self._cache.deserialize(self._stored)  # where it refuses, it compiles again
        self.config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Store new kernels; where that fails, the next start is only slower."""
        blob = bytes(self._cache.serialize())
        if self._path is not None and blob and blob != self._stored:
            with contextlib.suppress(OSError, OutputError):
                write_whole(self._path, blob)
                self._stored = blob
