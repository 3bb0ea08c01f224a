"""A CUDA device in host memory, as `engines.cuda_api.CudaRuntime` has it, that forgives nothing.

Work is only queued, and done when somebody waits for it, so what is read too early is still poison.
Addresses are made up: none is used twice, and none lies in the host's memory. What a real device
answers with an error code gives that code; what would silently go wrong there raises StandinError.
"""

from __future__ import annotations

import ctypes
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import count
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Span = tuple[int, int]  # address, bytes

ALIGNMENT = 256  # of what cudaMalloc gives, and no more than that
POISON = 0xFF  # NaN in every floating-point type
_FIRST_ADDRESS = 1 << 56  # beyond any address of the host


class StandinError(AssertionError):
    """Something that a real device does not report and that makes its results wrong."""


class Error(IntEnum):
    """`cudaError_t`, what is used of it."""

    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorInvalidResourceHandle = 400
    cudaErrorNotReady = 600
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901
    cudaErrorCapturedEvent = 907


class MemcpyKind(IntEnum):
    """`cudaMemcpyKind`."""

    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class CaptureMode(IntEnum):
    """`cudaStreamCaptureMode`."""

    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


class DeviceAttr(IntEnum):
    """`cudaDeviceAttr`, what is used of it."""

    cudaDevAttrIntegrated = 18
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


_KINDS = {
    MemcpyKind.cudaMemcpyHostToDevice: "host to device",
    MemcpyKind.cudaMemcpyDeviceToHost: "device to host",
    MemcpyKind.cudaMemcpyDeviceToDevice: "device to device",
}


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call that was made; `kind` says which way a copy went."""

    name: str
    kind: str = ""
    nbytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Work:
    """Something queued: what it does, and the device memory that it uses."""

    name: str
    run: Callable[[], None]
    spans: tuple[Span, ...] = ()


class Handle:
    """What CUDA gives for a stream, event or graph: nothing can be read off it."""

    def __init__(self, number: int) -> None:
        self._number = number

    def __int__(self) -> int:
        return self._number


@dataclass(kw_only=True)
class _Stream:
    queue: list[Work] = field(default_factory=list)
    captured: list[Work] | None = None  # while it is being captured
    invalid: bool = False  # the capture has met something that cannot be captured


@dataclass(kw_only=True)
class _Event:
    stream: _Stream | None = None  # where it was last recorded
    mark: Work | None = None
    passed: float | None = None  # when the device came to it, in seconds
    captured: bool = False


@dataclass(frozen=True, kw_only=True)
class _Graph:
    work: tuple[Work, ...]


@dataclass(frozen=True, kw_only=True)
class _GraphExec:
    work: tuple[Work, ...]


class FakeCuda(ModuleType):
    """`cuda.bindings.runtime` for one pretended device (or several alike).

    Attributes:
        counts: how often each call was made, by name.
        log: every call, in order.
        kernels: names of the kernels that were queued or captured, in order.
    """

    cudaStreamNonBlocking = 1
    cudaEventBlockingSync = 1
    cudaError_t = Error
    cudaMemcpyKind = MemcpyKind
    cudaStreamCaptureMode = CaptureMode
    cudaDeviceAttr = DeviceAttr

    def __init__(
        self,
        *,
        compute_capability: tuple[int, int] = (8, 6),
        name: str = "Stand-in GPU",
        total_memory: int = 8 << 30,
        driver: int = 13000,
        devices: int = 1,
        integrated: bool = False,
    ) -> None:
        super().__init__("cuda.bindings.runtime")
        self.compute_capability = compute_capability
        self.device_name = name
        self.total_memory = total_memory
        self.driver = driver
        self.devices = devices
        self.integrated = integrated
        self.counts: Counter[str] = Counter()
        self.log: list[Call] = []
        self.kernels: list[str] = []
        self._memory: dict[int, Bytes] = {}
        self._freed: dict[int, int] = {}
        self._next_address = _FIRST_ADDRESS
        self._handles: dict[int, Any] = {}
        self._numbers = count(1)

    # --- what tests ask ---------------------------------------------------------------------------

    def live_allocations(self) -> dict[int, int]:
        """Bytes of all memory that was not freed, by address."""
        return {address: len(memory) for address, memory in self._memory.items()}

    def live_handles(self) -> list[str]:
        """Kinds of all streams, events and graphs that were not destroyed."""
        return [type(thing).__name__.removeprefix("_") for thing in self._handles.values()]

    def pending(self, stream: Any) -> list[str]:
        """Names of what is queued in a stream and not done yet."""
        return [work.name for work in self._stream(stream).queue]

    # --- what the TensorRT stand-in uses ----------------------------------------------------------

    def view(self, address: int, nbytes: int) -> Bytes:
        """Return device memory, or say what is wrong with the address."""
        for start, memory in self._memory.items():
            if start <= address < start + len(memory):
                if address + nbytes > start + len(memory):
                    raise StandinError(
                        f"{nbytes} bytes at {address:#x} end "
                        f"{address + nbytes - start - len(memory)} bytes past their allocation"
                    )
                return memory[address - start : address - start + nbytes]
        for start, size in self._freed.items():
            if start <= address < start + size:
                raise StandinError(f"{address:#x} was freed")
        raise StandinError(f"{address:#x} is no device memory")

    def knows_stream(self, stream: Any) -> bool:
        """Whether the stream exists."""
        return isinstance(self._handles.get(int(stream)), _Stream)

    def is_capturing(self, stream: Any) -> bool:
        """Whether the stream is being captured."""
        return self._stream(stream).captured is not None

    def enqueue(self, stream: Any, work: Work) -> None:
        """Queue a kernel, or add it to the graph that is being captured."""
        self.kernels.append(work.name)
        self._add(self._stream(stream), work)

    # --- device -----------------------------------------------------------------------------------

    def cudaGetErrorString(self, error: Any) -> tuple[Error, bytes]:
        """Text of an error."""
        return Error.cudaSuccess, _TEXTS[Error(int(error))].encode()

    def cudaDriverGetVersion(self) -> tuple[Error, int]:
        """1000 * major + 10 * minor of CUDA."""
        self._note("cudaDriverGetVersion")
        return Error.cudaSuccess, self.driver

    def cudaGetDeviceCount(self) -> tuple[Error, Any]:
        """Count the devices; the driver is looked at first."""
        self._note("cudaGetDeviceCount")
        if self.driver < 12000:
            return Error.cudaErrorInsufficientDriver, None
        if not self.devices:
            return Error.cudaErrorNoDevice, None
        return Error.cudaSuccess, self.devices

    def cudaSetDevice(self, device: int) -> tuple[Error]:
        """Make a device the current one."""
        self._note("cudaSetDevice")
        return (self._device_error(device),)

    def cudaGetDeviceProperties(self, device: int) -> tuple[Error, Any]:
        """Describe a device."""
        self._note("cudaGetDeviceProperties")
        error = self._device_error(device)
        major, minor = self.compute_capability
        properties = SimpleNamespace(
            name=self.device_name.encode().ljust(256, b"\0"),
            major=major,
            minor=minor,
            integrated=int(self.integrated),
            totalGlobalMem=self.total_memory,
        )
        return error, None if error else properties

    def cudaDeviceGetAttribute(self, attr: Any, device: int) -> tuple[Error, Any]:
        """One number of a device."""
        self._note("cudaDeviceGetAttribute")
        error = self._device_error(device)
        major, minor = self.compute_capability
        values = {
            DeviceAttr.cudaDevAttrIntegrated: int(self.integrated),
            DeviceAttr.cudaDevAttrComputeCapabilityMajor: major,
            DeviceAttr.cudaDevAttrComputeCapabilityMinor: minor,
        }
        return error, None if error else values[DeviceAttr(int(attr))]

    # --- memory -----------------------------------------------------------------------------------

    def cudaMemGetInfo(self) -> tuple[Error, int, int]:
        """Free bytes and all bytes."""
        self._note("cudaMemGetInfo")
        return Error.cudaSuccess, self.total_memory - self._used(), self.total_memory

    def cudaMalloc(self, size: int) -> tuple[Error, Any]:
        """Give memory full of NaN."""
        self._note("cudaMalloc", nbytes=size)
        if self._unsafe_in_capture():
            return Error.cudaErrorStreamCaptureUnsupported, None
        if self._used() + size > self.total_memory:
            return Error.cudaErrorMemoryAllocation, None
        address = self._next_address
        self._memory[address] = np.full(size, POISON, np.uint8)
        # A gap between allocations, so that one byte too many is never somebody else's.
        self._next_address += (-(-size // ALIGNMENT) + 1) * ALIGNMENT
        return Error.cudaSuccess, address

    def cudaFree(self, devPtr: int) -> tuple[Error]:
        """Take memory back that nothing queued uses."""
        self._note("cudaFree")
        if self._unsafe_in_capture():
            return (Error.cudaErrorStreamCaptureUnsupported,)
        if int(devPtr) == 0:
            return (Error.cudaSuccess,)
        if int(devPtr) not in self._memory:
            return (Error.cudaErrorInvalidValue,)
        end = int(devPtr) + len(self._memory[int(devPtr)])
        for stream in self._all(_Stream):
            for work in stream.queue:
                if any(devPtr < start + size and start < end for start, size in work.spans):
                    raise StandinError(f"{int(devPtr):#x} is freed and {work.name} still uses it")
        self._freed[int(devPtr)] = len(self._memory.pop(int(devPtr)))
        return (Error.cudaSuccess,)

    def cudaMemcpyAsync(
        self, dst: int, src: int, count: int, kind: Any, stream: int
    ) -> tuple[Error]:
        """Queue a copy; the host's memory is pageable."""
        way = _KINDS[MemcpyKind(int(kind))]
        self._note("cudaMemcpyAsync", kind=way, nbytes=count)
        target = self._stream_or_none(stream)
        if target is None:
            return (Error.cudaErrorInvalidResourceHandle,)
        if way != "device to device" and target.captured is not None:
            target.invalid = True  # pageable memory cannot be part of a graph
            return (Error.cudaErrorStreamCaptureUnsupported,)
        make = {
            "host to device": self._from_host,
            "device to host": self._to_host,
            "device to device": self._within,
        }[way]
        self._add(target, make(int(dst), int(src), count))
        return (Error.cudaSuccess,)

    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: int) -> tuple[Error]:
        """Queue filling with a byte."""
        self._note("cudaMemsetAsync", nbytes=count)
        target = self._stream_or_none(stream)
        if target is None:
            return (Error.cudaErrorInvalidResourceHandle,)

        def run() -> None:
            self.view(devPtr, count)[:] = value

        self._add(target, Work(name="memset", run=run, spans=((devPtr, count),)))
        return (Error.cudaSuccess,)

    # --- streams ----------------------------------------------------------------------------------

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Error, Any]:
        """Make a stream."""
        self._note("cudaStreamCreateWithFlags")
        return Error.cudaSuccess, self._new(_Stream())

    def cudaStreamSynchronize(self, stream: int) -> tuple[Error]:
        """Do everything that is queued."""
        self._note("cudaStreamSynchronize")
        target = self._stream_or_none(stream)
        if target is None:
            return (Error.cudaErrorInvalidResourceHandle,)
        if target.captured is not None:
            target.invalid = True
            return (Error.cudaErrorStreamCaptureUnsupported,)
        _drain(target)
        return (Error.cudaSuccess,)

    def cudaStreamDestroy(self, stream: int) -> tuple[Error]:
        """Take a stream back once its work is done."""
        self._note("cudaStreamDestroy")
        target = self._stream_or_none(stream)
        if target is None:
            return (Error.cudaErrorInvalidResourceHandle,)
        if target.captured is not None:
            raise StandinError("a stream is destroyed while it is captured")
        _drain(target)
        return (self._drop(stream, _Stream),)

    # --- graphs -----------------------------------------------------------------------------------

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> tuple[Error]:
        """Record from here on, and run nothing."""
        self._note("cudaStreamBeginCapture")
        CaptureMode(int(mode))
        target = self._stream_or_none(stream)
        if target is None:
            return (Error.cudaErrorInvalidResourceHandle,)
        if target.captured is not None:
            return (Error.cudaErrorStreamCaptureUnsupported,)
        target.captured, target.invalid = [], False
        return (Error.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Error, Any]:
        """Stop recording and give the graph."""
        self._note("cudaStreamEndCapture")
        target = self._stream_or_none(stream)
        if target is None:
            return Error.cudaErrorInvalidResourceHandle, None
        if target.captured is None:
            return Error.cudaErrorInvalidValue, None
        work, target.captured = tuple(target.captured), None
        if target.invalid:
            return Error.cudaErrorStreamCaptureInvalidated, None
        return Error.cudaSuccess, self._new(_Graph(work=work))

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Error, Any]:
        """Make a graph ready to be launched."""
        self._note("cudaGraphInstantiate")
        found = self._handles.get(int(graph))
        if not isinstance(found, _Graph):
            return Error.cudaErrorInvalidResourceHandle, None
        return Error.cudaSuccess, self._new(_GraphExec(work=found.work))

    def cudaGraphLaunch(self, graphExec: Any, stream: int) -> tuple[Error]:
        """Queue all that was recorded."""
        self._note("cudaGraphLaunch")
        found = self._handles.get(int(graphExec))
        target = self._stream_or_none(stream)
        if not isinstance(found, _GraphExec) or target is None:
            return (Error.cudaErrorInvalidResourceHandle,)
        for work in found.work:
            self._add(target, work)
        return (Error.cudaSuccess,)

    def cudaGraphExecDestroy(self, graphExec: Any) -> tuple[Error]:
        """Take back what can be launched."""
        self._note("cudaGraphExecDestroy")
        return (self._drop(graphExec, _GraphExec),)

    def cudaGraphDestroy(self, graph: Any) -> tuple[Error]:
        """Take back what was recorded."""
        self._note("cudaGraphDestroy")
        return (self._drop(graph, _Graph),)

    # --- events -----------------------------------------------------------------------------------

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[Error, Any]:
        """Make an event."""
        self._note("cudaEventCreateWithFlags")
        return Error.cudaSuccess, self._new(_Event())

    def cudaEventRecord(self, event: Any, stream: int) -> tuple[Error]:
        """Set the mark behind all that is queued."""
        self._note("cudaEventRecord")
        found, target = self._event(event), self._stream_or_none(stream)
        if found is None or target is None:
            return (Error.cudaErrorInvalidResourceHandle,)
        found.captured = target.captured is not None
        if found.captured:
            return (Error.cudaSuccess,)  # an edge of the graph, not a mark in the stream

        def run() -> None:
            if found.mark is mark:
                found.passed = time.perf_counter()

        mark = Work(name="event", run=run)
        found.stream, found.mark, found.passed = target, mark, None
        self._add(target, mark)
        return (Error.cudaSuccess,)

    def cudaEventSynchronize(self, event: Any) -> tuple[Error]:
        """Do what is queued up to the mark."""
        self._note("cudaEventSynchronize")
        found = self._event(event)
        if found is None:
            return (Error.cudaErrorInvalidResourceHandle,)
        if found.captured:
            return (Error.cudaErrorCapturedEvent,)
        if self._unsafe_in_capture():
            return (Error.cudaErrorStreamCaptureUnsupported,)
        if found.stream is not None and found.passed is None:
            _drain(found.stream, until=found.mark)
        return (Error.cudaSuccess,)

    def cudaEventElapsedTime(self, start: Any, end: Any) -> tuple[Error, Any]:
        """Milliseconds between two marks that were passed."""
        self._note("cudaEventElapsedTime")
        first, last = self._event(start), self._event(end)
        if first is None or last is None or first.mark is None or last.mark is None:
            return Error.cudaErrorInvalidResourceHandle, None
        if first.passed is None or last.passed is None:
            return Error.cudaErrorNotReady, None
        return Error.cudaSuccess, (last.passed - first.passed) * 1000

    def cudaEventDestroy(self, event: Any) -> tuple[Error]:
        """Take an event back."""
        self._note("cudaEventDestroy")
        return (self._drop(event, _Event),)

    # --- inside -----------------------------------------------------------------------------------

    def _note(self, name: str, *, kind: str = "", nbytes: int = 0) -> None:
        self.counts[name] += 1
        self.log.append(Call(name=name, kind=kind, nbytes=nbytes))

    def _device_error(self, device: int) -> Error:
        return Error.cudaSuccess if 0 <= device < self.devices else Error.cudaErrorInvalidDevice

    def _used(self) -> int:
        return sum(map(len, self._memory.values()))

    def _new(self, thing: Any) -> Handle:
        # Handles look like pointers and, like addresses, none comes twice.
        number = 0x5000 + next(self._numbers) * 16
        self._handles[number] = thing
        return Handle(number)

    def _drop(self, handle: Any, kind: type) -> Error:
        if not isinstance(self._handles.get(int(handle)), kind):
            return Error.cudaErrorInvalidResourceHandle
        del self._handles[int(handle)]
        return Error.cudaSuccess

    def _all(self, kind: type) -> list[Any]:
        return [thing for thing in self._handles.values() if isinstance(thing, kind)]

    def _stream_or_none(self, handle: Any) -> _Stream | None:
        found = self._handles.get(int(handle))
        return found if isinstance(found, _Stream) else None

    def _stream(self, handle: Any) -> _Stream:
        found = self._stream_or_none(handle)
        if found is None:
            raise StandinError(f"{int(handle):#x} is no stream")
        return found

    def _event(self, handle: Any) -> _Event | None:
        found = self._handles.get(int(handle))
        return found if isinstance(found, _Event) else None

    def _unsafe_in_capture(self) -> bool:
        """Spoil captures under way, as calls do that may wait for the device."""
        capturing = [stream for stream in self._all(_Stream) if stream.captured is not None]
        for stream in capturing:
            stream.invalid = True
        return bool(capturing)

    def _add(self, stream: _Stream, work: Work) -> None:
        for address, nbytes in work.spans:
            self.view(address, nbytes)
        if stream.captured is None:
            stream.queue.append(work)
        else:
            stream.captured.append(work)

    def _from_host(self, dst: int, src: int, nbytes: int) -> Work:
        host = _host(src, nbytes)

        def run() -> None:  # as late as a device may that reads the host's memory itself
            self.view(dst, nbytes)[:] = host

        return Work(name="copy from host", run=run, spans=((dst, nbytes),))

    def _to_host(self, dst: int, src: int, nbytes: int) -> Work:
        self.view(src, nbytes)
        host = _host(dst, nbytes)
        host[:] = POISON

        def run() -> None:
            host[:] = self.view(src, nbytes)

        return Work(name="copy to host", run=run, spans=((src, nbytes),))

    def _within(self, dst: int, src: int, nbytes: int) -> Work:
        if dst < src + nbytes and src < dst + nbytes:
            raise StandinError(f"a copy of {nbytes} bytes from {src:#x} to {dst:#x} overlaps")

        def run() -> None:
            self.view(dst, nbytes)[:] = self.view(src, nbytes)

        return Work(name="copy", run=run, spans=((dst, nbytes), (src, nbytes)))


def _host(address: int, nbytes: int) -> Bytes:
    if address >= _FIRST_ADDRESS:
        raise StandinError(f"{address:#x} is device memory where the host's belongs")
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


def _drain(stream: _Stream, until: Work | None = None) -> None:
    while stream.queue:
        work = stream.queue.pop(0)
        work.run()
        if work is until:
            return


_TEXTS = {
    Error.cudaSuccess: "no error",
    Error.cudaErrorInvalidValue: "invalid argument",
    Error.cudaErrorMemoryAllocation: "out of memory",
    Error.cudaErrorInsufficientDriver: "CUDA driver version is insufficient for the runtime",
    Error.cudaErrorNoDevice: "no CUDA-capable device is detected",
    Error.cudaErrorInvalidDevice: "invalid device ordinal",
    Error.cudaErrorInvalidResourceHandle: "invalid resource handle",
    Error.cudaErrorNotReady: "device not ready",
    Error.cudaErrorStreamCaptureUnsupported: "operation not permitted when stream is capturing",
    Error.cudaErrorStreamCaptureInvalidated: "operation failed due to an earlier capture error",
    Error.cudaErrorCapturedEvent: "operation not permitted on an event recorded in a capture",
}
