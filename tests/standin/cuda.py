"""CUDA in host memory: the part of `cuda.bindings.runtime` that we use, late and strict.

A stream is a queue that runs only when the host waits for it, so whatever is read too early shows.
Memory is poisoned with NaN when it is allocated, and a host buffer when a copy into it is queued.
What would be silent corruption on a device is a `StandinError`; what CUDA refuses is an error code.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 256
_POISON = 0xFF  # four of them are a NaN


class StandinError(AssertionError):
    """What a real device would do wrong without a word."""


class Error(IntEnum):
    """The error codes that are given here."""

    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidDevice = 101
    cudaErrorInvalidResourceHandle = 400
    cudaErrorStreamCaptureUnsupported = 900


class Kind(IntEnum):
    """`cudaMemcpyKind`."""

    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


_KINDS = {1: "host to device", 2: "device to host", 3: "device to device"}
_TEXTS = {
    Error.cudaErrorMemoryAllocation: "out of memory",
    Error.cudaErrorInsufficientDriver: "CUDA driver version is insufficient for CUDA runtime version",
    Error.cudaErrorNoDevice: "no CUDA-capable device is detected",
}


@dataclass(frozen=True)
class Call:
    """One call, for tests that count."""

    name: str
    kind: str = ""


@dataclass
class _Work:
    """Something queued: what it does, and the device memory it touches."""

    run: Callable[[], None]
    touches: tuple[tuple[int, int], ...] = ()


@dataclass
class _Stream:
    queue: list[tuple[int, _Work]] = field(default_factory=list)
    capture: list[_Work] | None = None


@dataclass
class _Event:
    ticket: int = -1
    stream: int = 0
    done_at: float | None = None


class FakeCuda:
    """A stand-in for the module `cuda.bindings.runtime`."""

    cudaStreamNonBlocking = 1
    cudaEventBlockingSync = 1
    cudaError_t = Error
    cudaMemcpyKind = Kind
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaDeviceAttr = SimpleNamespace()

    def __init__(
        self,
        *,
        compute_capability: tuple[int, int] = (8, 6),
        name: str = "Stand-in RTX",
        total_memory: int = 2**33,
        driver: int = 13000,
        devices: int = 1,
        integrated: bool = False,
    ) -> None:
        self._capability, self._name = compute_capability, name
        self._total, self._driver = total_memory, driver
        self._devices, self._integrated = devices, integrated
        self._memory: dict[int, NDArray[np.uint8]] = {}
        self._sizes: dict[int, int] = {}
        self._streams: dict[int, _Stream] = {}
        self._events: dict[int, _Event] = {}
        self._graphs: dict[int, list[_Work]] = {}
        self._executables: dict[int, list[_Work]] = {}
        self._next = 1
        self._clock = 0.0
        self.counts: Counter[str] = Counter()
        self.log: list[Call] = []

    def __getattribute__(self, name: str) -> Any:
        """Count every call of a CUDA function."""
        value = object.__getattribute__(self, name)
        if name.startswith("cuda") and callable(value) and not isinstance(value, type):

            def counted(*arguments: Any) -> Any:
                kind = _KINDS[int(arguments[3])] if name == "cudaMemcpyAsync" else ""
                self.counts[name] += 1
                self.log.append(Call(name, kind))
                return value(*arguments)

            return counted
        return value

    # --- what tests ask -----------------------------------------------------------------------

    def live_allocations(self) -> dict[int, int]:
        """Sizes of the memory that was not given back, by address."""
        return dict(self._sizes)

    def live_handles(self) -> list[str]:
        """Streams, events and graphs that were not given back."""
        kinds = {
            "stream": self._streams,
            "event": self._events,
            "graph": self._graphs,
            "executable graph": self._executables,
        }
        return [kind for kind, handles in kinds.items() for _ in handles]

    # --- what the stand-in for TensorRT uses --------------------------------------------------

    def launch(
        self, stream: int, run: Callable[[], None], touches: tuple[tuple[int, int], ...]
    ) -> None:
        """Queue a kernel that touches device memory, (address, bytes) each."""
        for address, nbytes in touches:
            self._check(address, nbytes)
        self._put(stream, _Work(run, touches))

    def view(self, address: int, nbytes: int) -> NDArray[np.uint8]:
        """Return device memory as bytes, when a kernel runs."""
        base = self._check(address, nbytes)
        begin = address - base
        return self._memory[base][begin : begin + nbytes]

    # --- device -------------------------------------------------------------------------------

    def cudaGetErrorString(self, error: Any) -> tuple[Any, bytes]:
        return Error.cudaSuccess, _TEXTS.get(error, Error(error).name).encode()

    def cudaDriverGetVersion(self) -> tuple[Any, int]:
        return Error.cudaSuccess, self._driver

    def cudaGetDeviceCount(self) -> tuple[Any, int]:
        if self._driver == 0:
            return Error.cudaErrorInsufficientDriver, 0
        if self._devices == 0:
            return Error.cudaErrorNoDevice, 0
        return Error.cudaSuccess, self._devices

    def cudaSetDevice(self, device: int) -> tuple[Any]:
        return (Error.cudaSuccess if device < self._devices else Error.cudaErrorInvalidDevice,)

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, Any]:
        major, minor = self._capability
        return Error.cudaSuccess, SimpleNamespace(
            name=self._name.encode(), major=major, minor=minor, integrated=int(self._integrated)
        )

    def cudaDeviceGetAttribute(self, attr: Any, device: int) -> tuple[Any, int]:
        return Error.cudaErrorInvalidValue, 0

    def cudaMemGetInfo(self) -> tuple[Any, int, int]:
        return Error.cudaSuccess, self._total - sum(self._sizes.values()), self._total

    # --- memory -------------------------------------------------------------------------------

    def cudaMalloc(self, size: int) -> tuple[Any, int]:
        if sum(self._sizes.values()) + size > self._total:
            return Error.cudaErrorMemoryAllocation, 0
        raw = np.full(size + ALIGNMENT, _POISON, np.uint8)
        skip = -raw.ctypes.data % ALIGNMENT
        address = raw.ctypes.data + skip
        self._memory[address] = raw[skip : skip + size]
        self._sizes[address] = size
        return Error.cudaSuccess, address

    def cudaFree(self, devPtr: int) -> tuple[Any]:
        if devPtr not in self._sizes:
            raise StandinError(f"cudaFree of {devPtr:#x}, which is not allocated")
        end = devPtr + self._sizes[devPtr]
        for stream in self._streams.values():
            for _, work in stream.queue:
                if any(devPtr < a + n and a < end for a, n in work.touches):
                    raise StandinError("memory is freed while queued work uses it")
        self._memory[devPtr][:] = _POISON
        del self._memory[devPtr], self._sizes[devPtr]
        return (Error.cudaSuccess,)

    def cudaMemcpyAsync(self, dst: int, src: int, count: int, kind: Any, stream: int) -> tuple[Any]:
        if kind == Kind.cudaMemcpyHostToDevice:
            data = np.frombuffer(ctypes.string_at(src, count), np.uint8)
            self._check(dst, count)

            def run() -> None:
                self.view(dst, count)[:] = data

            touches: tuple[tuple[int, int], ...] = ((dst, count),)
        elif kind == Kind.cudaMemcpyDeviceToHost:
            self._check(src, count)
            ctypes.memset(dst, _POISON, count)  # until the copy has really happened

            def run() -> None:
                ctypes.memmove(dst, self.view(src, count).tobytes(), count)

            touches = ((src, count),)
        else:
            self._check(src, count)
            self._check(dst, count)

            def run() -> None:
                self.view(dst, count)[:] = self.view(src, count)

            touches = ((src, count), (dst, count))
        self._put(stream, _Work(run, touches))
        return (Error.cudaSuccess,)

    def cudaMemsetAsync(self, devPtr: int, value: int, count: int, stream: int) -> tuple[Any]:
        self._check(devPtr, count)

        def run() -> None:
            self.view(devPtr, count)[:] = value

        self._put(stream, _Work(run, ((devPtr, count),)))
        return (Error.cudaSuccess,)

    # --- streams, events, graphs --------------------------------------------------------------

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, int]:
        return Error.cudaSuccess, self._new(self._streams, _Stream())

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any]:
        own = self._stream(stream)
        if own.capture is not None:
            return (Error.cudaErrorStreamCaptureUnsupported,)
        self._drain(own, None)
        return (Error.cudaSuccess,)

    def cudaStreamDestroy(self, stream: int) -> tuple[Any]:
        self._stream(stream)
        del self._streams[stream]
        return (Error.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: Any) -> tuple[Any]:
        own = self._stream(stream)
        if own.capture is not None:
            return (Error.cudaErrorStreamCaptureUnsupported,)
        own.capture = []
        return (Error.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[Any, int]:
        own = self._stream(stream)
        if own.capture is None:
            return Error.cudaErrorInvalidValue, 0
        captured, own.capture = own.capture, None
        return Error.cudaSuccess, self._new(self._graphs, captured)

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, int]:
        return Error.cudaSuccess, self._new(self._executables, self._graphs[graph])

    def cudaGraphDestroy(self, graph: int) -> tuple[Any]:
        del self._graphs[graph]
        return (Error.cudaSuccess,)

    def cudaGraphLaunch(self, graphExec: int, stream: int) -> tuple[Any]:
        for work in self._executables[graphExec]:
            for address, nbytes in work.touches:
                self._check(address, nbytes)
            self._put(stream, work)
        return (Error.cudaSuccess,)

    def cudaGraphExecDestroy(self, graphExec: int) -> tuple[Any]:
        del self._executables[graphExec]
        return (Error.cudaSuccess,)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[Any, int]:
        return Error.cudaSuccess, self._new(self._events, _Event())

    def cudaEventRecord(self, event: int, stream: int) -> tuple[Any]:
        own = self._events[event]

        def run() -> None:
            self._clock += 0.001
            own.done_at = self._clock

        own.done_at, own.stream = None, stream
        own.ticket = self._put(stream, _Work(run))
        return (Error.cudaSuccess,)

    def cudaEventSynchronize(self, event: int) -> tuple[Any]:
        own = self._events[event]
        if own.ticket >= 0 and own.done_at is None:
            self._drain(self._stream(own.stream), own.ticket)
        return (Error.cudaSuccess,)

    def cudaEventElapsedTime(self, start: int, end: int) -> tuple[Any, float]:
        first, last = self._events[start].done_at, self._events[end].done_at
        if first is None or last is None:
            return Error.cudaErrorInvalidResourceHandle, 0.0
        return Error.cudaSuccess, (last - first) * 1000

    def cudaEventDestroy(self, event: int) -> tuple[Any]:
        del self._events[event]
        return (Error.cudaSuccess,)

    # --- inside -------------------------------------------------------------------------------

    def _new(self, handles: dict[int, Any], value: Any) -> int:
        self._next += 1
        handles[self._next] = value
        return self._next

    def _stream(self, stream: int) -> _Stream:
        if stream not in self._streams:
            raise StandinError(f"stream {stream} does not exist")
        return self._streams[stream]

    def _put(self, stream: int, work: _Work) -> int:
        own = self._stream(stream)
        if own.capture is not None:
            own.capture.append(work)
            return -1
        self._next += 1
        own.queue.append((self._next, work))
        return self._next

    def _drain(self, stream: _Stream, last: int | None) -> None:
        while stream.queue and (last is None or stream.queue[0][0] <= last):
            _, work = stream.queue.pop(0)
            work.run()

    def _check(self, address: int, nbytes: int) -> int:
        """Return the allocation that holds all of a piece of memory."""
        for base, size in self._sizes.items():
            if base <= address and address + nbytes <= base + size:
                return base
        raise StandinError(f"{nbytes} bytes at {address:#x} are not in one live allocation")
