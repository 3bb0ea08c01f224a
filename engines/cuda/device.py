"""A CUDA device: memory, one stream, graphs and events, through `cuda.bindings.runtime` alone.

Everything is queued on the device's one stream and runs in order; the host waits only in
`download`, `synchronize` and `Event.wait`. The CUDA calls are an argument, so that tests can run
the same code without a GPU.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np

from sld_edge.engines.base import Array, Engine
from sld_edge.engines.cuda.api import CudaRuntime
from sld_edge.engines.errors import EngineError, MissingPackageError, one_line

ALIGNMENT = 256  # bytes; TensorRT needs every tensor's address to be a multiple


@dataclass(frozen=True)
class DeviceTensor:
    """A contiguous tensor on the device; `address` is a multiple of `ALIGNMENT`."""

    address: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def part(self, index: int, count: int) -> DeviceTensor:
        """Return the rows `index` to `index + count` of the first axis, without a copy."""
        step = self.nbytes // self.shape[0]
        return DeviceTensor(self.address + index * step, self.dtype, (count, *self.shape[1:]))


class Bound(Protocol):
    """A graph whose tensors have fixed addresses: running it is one call."""

    def enqueue(self) -> None:
        """Queue one run on the device's stream."""


@runtime_checkable
class DeviceEngine(Engine, Protocol):
    """An engine whose tensors can stay on a device."""

    capturable: bool  # whether a run may be captured in a CUDA graph

    @property
    def device(self) -> Device:
        """The device that runs the engine."""

    def bind(self, tensors: dict[str, DeviceTensor]) -> Bound:
        """Fix the shape and address of every input and output, by name.

        Raises:
            EngineError: a tensor is missing, or of a dtype or shape that the engine does not take.
        """


def cuda_runtime() -> CudaRuntime:
    """Import CUDA's bindings, or say how to install them."""
    try:
        runtime = importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise MissingPackageError("cuda-bindings", extra="rtx", why="a CUDA device") from error
    return cast(CudaRuntime, runtime)


class Device:
    """One CUDA device and its stream."""

    def __init__(self, index: int = 0, *, cuda: CudaRuntime | None = None) -> None:
        """Open device `index`.

        Raises:
            MissingPackageError: no cuda-bindings.
            EngineError: no driver, or no such device.
        """
        self._cuda = cuda if cuda is not None else cuda_runtime()
        (driver,) = self._call("cudaDriverGetVersion")
        if driver == 0:
            raise EngineError(
                "no NVIDIA driver is installed", do="install it if there is a GPU, or use the cpu"
            )
        (count,) = self._call("cudaGetDeviceCount")
        if index >= count:
            raise EngineError(f"no CUDA device {index}", got=f"{count} devices")
        self._call("cudaSetDevice", index)
        (properties,) = self._call("cudaGetDeviceProperties", index)
        name = properties.name
        self.name = name.decode().rstrip("\0") if isinstance(name, bytes) else str(name)
        self.compute_capability = f"{properties.major}.{properties.minor}"
        self.driver = f"{driver // 1000}.{driver % 1000 // 10}"
        self.integrated = bool(properties.integrated)  # memory shared with the host, as on a Jetson
        (stream,) = self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking)
        self.stream = int(stream)
        self.workspace = Workspace(self)
        self._uploads: list[Array] = []  # arrays that queued copies may still read
        self._allowed: int | None = None  # allocations until memory counts as full

    def memory(self) -> tuple[int, int]:
        """Bytes of device memory: free, and in all."""
        free, total = self._call("cudaMemGetInfo")
        return int(free), int(total)

    def allocate(self, nbytes: int) -> int:
        """Return the address of new memory, to be freed with `free`.

        Raises:
            EngineError: out of memory.
        """
        if self._allowed == 0:
            raise EngineError("CUDA: cudaMalloc failed", got="out of memory", do=_advice(2))
        if self._allowed is not None:
            self._allowed -= 1
        (address,) = self._call("cudaMalloc", max(1, nbytes))
        return int(address)

    @contextmanager
    def full_after(self, allocations: int) -> Iterator[None]:
        """Refuse memory as a full device does, after some allocations; for the self-test."""
        self._allowed = allocations
        try:
            yield
        finally:
            self._allowed = None

    def free(self, address: int) -> None:
        """Free memory, after all queued work is done."""
        self.synchronize()
        self._call("cudaFree", address)

    def upload(self, tensor: DeviceTensor, array: Array) -> None:
        """Queue a copy from the host; `array` may be changed when this returns."""
        if array.shape != tensor.shape or array.dtype != np.dtype(tensor.dtype):
            raise ValueError(f"{array.dtype} {array.shape} for {tensor}")
        # A device that reads the host's memory itself, as a Jetson, may read it later.
        array = np.array(array, order="C")
        self._uploads.append(array)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._copy(tensor.address, array.ctypes.data, array.nbytes, kind)

    def download(self, tensor: DeviceTensor) -> Array:
        """Wait for all queued work and return a copy on the host."""
        array = np.empty(tensor.shape, tensor.dtype)
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._copy(array.ctypes.data, tensor.address, array.nbytes, kind)
        self.synchronize()
        return array

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Queue a copy within the device."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._copy(target, source, nbytes, kind)

    def clear(self, tensor: DeviceTensor) -> None:
        """Queue a fill with zeros."""
        self._call("cudaMemsetAsync", tensor.address, 0, tensor.nbytes, self.stream)

    def synchronize(self) -> None:
        """Wait for all queued work."""
        self._call("cudaStreamSynchronize", self.stream)
        self._uploads.clear()

    def event(self) -> Event:
        """Return a mark that can be set in the stream, waited for, and timed."""
        (handle,) = self._call("cudaEventCreateWithFlags", self._cuda.cudaEventBlockingSync)
        return Event(handle, self._call, self.stream)

    def capture(self, queue: Callable[[], None]) -> Graph:
        """Record the work that `queue` queues as one graph, without running it."""
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.stream, mode)
        try:
            queue()
        except BaseException:  # report this error, not a later one
            error, graph = self._cuda.cudaStreamEndCapture(self.stream)
            if int(error) == 0:
                self._cuda.cudaGraphDestroy(graph)
            raise
        (graph,) = self._call("cudaStreamEndCapture", self.stream)
        try:
            (executable,) = self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)
        return Graph(executable, self._call, self.stream)

    def close(self) -> None:
        """Free the stream and the workspace."""
        self.workspace.close()
        self._call("cudaStreamDestroy", self.stream)

    def _copy(self, target: int, source: int, nbytes: int, kind: Any) -> None:
        self._call("cudaMemcpyAsync", target, source, nbytes, kind, self.stream)

    def _call(self, name: str, *arguments: Any) -> tuple[Any, ...]:
        """Make a CUDA call; an error becomes one line."""
        try:
            error, *results = getattr(self._cuda, name)(*arguments)
        except (ImportError, OSError, RuntimeError) as problem:  # cuda-bindings 12.8 raises
            raise EngineError(
                f"CUDA: {name} does not reach the NVIDIA driver",
                got=one_line(problem),
                do="install the driver if there is a GPU, or use --provider cpu",
            ) from problem
        if int(error) != 0:
            _, text = self._cuda.cudaGetErrorString(error)
            reason = text.decode() if isinstance(text, bytes) else str(text)
            raise EngineError(f"CUDA: {name} failed", got=reason, do=_advice(int(error)))
        return tuple(results)


class Event:
    """A mark in the stream."""

    def __init__(self, handle: Any, call: Callable[..., tuple[Any, ...]], stream: int) -> None:
        """Use `Device.event`."""
        self._handle, self._call, self._stream = handle, call, stream

    def record(self) -> None:
        """Set the mark behind all queued work."""
        self._call("cudaEventRecord", self._handle, self._stream)

    def wait(self) -> None:
        """Wait until the device has reached the mark, without spinning."""
        self._call("cudaEventSynchronize", self._handle)

    def seconds_since(self, earlier: Event) -> float:
        """Return the time from an earlier mark to this one; both must have been passed."""
        (milliseconds,) = self._call("cudaEventElapsedTime", earlier._handle, self._handle)
        return float(milliseconds) / 1000

    def close(self) -> None:
        """Free the mark."""
        self._call("cudaEventDestroy", self._handle)


class Graph:
    """Recorded work."""

    def __init__(self, handle: Any, call: Callable[..., tuple[Any, ...]], stream: int) -> None:
        """Use `Device.capture`."""
        self._handle, self._call, self._stream = handle, call, stream

    def launch(self) -> None:
        """Queue all the recorded work at once."""
        self._call("cudaGraphLaunch", self._handle, self._stream)

    def close(self) -> None:
        """Free the graph."""
        self._call("cudaGraphExecDestroy", self._handle)


class Workspace:
    """Activation memory that all plans on a device share, one after another."""

    def __init__(self, device: Device) -> None:
        """Use `Device.workspace`; it starts empty."""
        self._device = device
        self.address = 0
        self.nbytes = 0
        self.generation = 0  # rises whenever the address changes

    def require(self, nbytes: int) -> None:
        """Grow to at least `nbytes`."""
        if nbytes > self.nbytes:
            self.close()
            self.address = self._device.allocate(nbytes)
            self.nbytes = nbytes
            self.generation += 1

    def close(self) -> None:
        """Free the memory."""
        if self.address:
            self._device.free(self.address)
            self.generation += 1
        self.address = self.nbytes = 0


class Arena:
    """Aligned tensors in one block of device memory; `close` frees all of them."""

    def __init__(self, device: Device, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
        """Lay out `tensors`, dtype and shape by name, in their order."""
        self.device = device
        offsets: dict[str, int] = {}
        size = 0
        for name, (dtype, shape) in tensors.items():
            offsets[name] = size
            size += -(-DeviceTensor(0, dtype, shape).nbytes // ALIGNMENT) * ALIGNMENT
        self.nbytes = size
        self.address = device.allocate(size)
        self._tensors = {
            name: DeviceTensor(self.address + offsets[name], dtype, shape)
            for name, (dtype, shape) in tensors.items()
        }

    def __getitem__(self, name: str) -> DeviceTensor:
        return self._tensors[name]

    def span(self, first: str, last: str) -> DeviceTensor:
        """Return the memory from tensor `first` to tensor `last`, both included, as bytes."""
        begin, end = self._tensors[first], self._tensors[last]
        nbytes = end.address + end.nbytes - begin.address
        return DeviceTensor(begin.address, "uint8", (nbytes,))

    def holds(self, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> bool:
        """Whether the arena was laid out for exactly these tensors."""
        layout = {name: (tensor.dtype, tensor.shape) for name, tensor in self._tensors.items()}
        return layout == tensors

    def close(self) -> None:
        """Free the memory."""
        self.device.free(self.address)


def _advice(error: int) -> str | None:
    return {
        2: "out of device memory: choose a smaller --width and --height, add --low-memory, or use "
        "--provider cpu",
        35: "update the NVIDIA driver, or use --provider cpu",
        100: "no CUDA device was found: use --provider cpu",
    }.get(error)
