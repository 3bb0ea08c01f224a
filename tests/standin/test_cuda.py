"""The CUDA stand-in forgives nothing: every refusal is provoked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from standin.cuda import ALIGNMENT, Error, FakeCuda, MemcpyKind, StandinError

UP, DOWN, WITHIN = (
    MemcpyKind.cudaMemcpyHostToDevice,
    MemcpyKind.cudaMemcpyDeviceToHost,
    MemcpyKind.cudaMemcpyDeviceToDevice,
)
LOCAL = FakeCuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda(total_memory=10_000)


@pytest.fixture
def stream(cuda: FakeCuda) -> Any:
    _, stream = cuda.cudaStreamCreateWithFlags(cuda.cudaStreamNonBlocking)
    return stream


def memory(cuda: FakeCuda, size: int = 64) -> int:
    error, address = cuda.cudaMalloc(size)
    assert error == 0
    return int(address)


def test_memory_is_aligned_poisoned_and_never_given_twice(cuda: FakeCuda) -> None:
    first = memory(cuda, 10)
    assert first % ALIGNMENT == 0
    assert np.isnan(cuda.view(first, 8).view(np.float32)).all()
    assert np.isnan(cuda.view(first, 8).view(np.float16)).all()
    assert cuda.cudaFree(first) == (0,)
    assert memory(cuda, 10) != first


def test_a_download_is_poison_until_it_was_waited_for(cuda: FakeCuda, stream: Any) -> None:
    address = memory(cuda)
    host = np.zeros(16, np.float32)
    cuda.cudaMemsetAsync(address, 0, 64, stream)
    cuda.cudaMemcpyAsync(host.ctypes.data, address, 64, DOWN, stream)
    assert np.isnan(host).all()
    cuda.cudaStreamSynchronize(stream)
    assert not host.any()


def test_an_upload_reads_and_writes_in_turn(cuda: FakeCuda, stream: Any) -> None:
    address = memory(cuda)
    host = np.ones(16, np.float32)
    cuda.cudaMemcpyAsync(address, host.ctypes.data, 64, UP, stream)
    host[:] = 2
    assert np.isnan(cuda.view(address, 64).view(np.float32)).all()
    cuda.cudaStreamSynchronize(stream)
    assert (cuda.view(address, 64).view(np.float32) == 2).all()


Act = Callable[[FakeCuda, Any, int, int], Any]


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda c, s, a, h: c.cudaMemsetAsync(12345, 0, 4, s), "no device memory"),
        (lambda c, s, a, h: c.cudaMemsetAsync(a, 0, 65, s), "end 1 bytes past"),
        (lambda c, s, a, h: c.cudaMemsetAsync(a + 64, 0, 1, s), "no device memory"),
        (lambda c, s, a, h: c.cudaMemcpyAsync(h, a, 64, UP, s), "where the host's belongs"),
        (lambda c, s, a, h: c.cudaMemcpyAsync(a, h, 64, DOWN, s), "no device memory"),
        (lambda c, s, a, h: c.cudaMemcpyAsync(h, a, 64, WITHIN, s), "no device memory"),
        (lambda c, s, a, h: c.cudaMemcpyAsync(a, a + 32, 32, DOWN, s), "the host's belongs"),
        (lambda c, s, a, h: c.cudaMemcpyAsync(a, a + 16, 32, WITHIN, s), "overlaps"),
    ],
)
def test_memory_that_is_not_there(act: Act, says: str, cuda: FakeCuda, stream: Any) -> None:
    host = np.zeros(64, np.uint8)
    with pytest.raises(StandinError, match=says):
        act(cuda, stream, memory(cuda), host.ctypes.data)


def test_memory_that_was_freed(cuda: FakeCuda, stream: Any) -> None:
    address = memory(cuda)
    cuda.cudaFree(address)
    with pytest.raises(StandinError, match="was freed"):
        cuda.cudaMemsetAsync(address + 8, 0, 4, stream)
    assert cuda.cudaFree(address) == (Error.cudaErrorInvalidValue,)
    assert cuda.cudaFree(0) == (0,)


def test_memory_that_queued_work_uses(cuda: FakeCuda, stream: Any) -> None:
    address = memory(cuda)
    cuda.cudaMemsetAsync(address + 60, 0, 4, stream)
    with pytest.raises(StandinError, match="memset still uses it"):
        cuda.cudaFree(address)
    cuda.cudaStreamSynchronize(stream)
    assert cuda.cudaFree(address) == (0,)


def test_a_graph_over_freed_memory(cuda: FakeCuda, stream: Any) -> None:
    address = memory(cuda)
    cuda.cudaStreamBeginCapture(stream, LOCAL)
    cuda.cudaMemsetAsync(address, 0, 4, stream)
    _, graph = cuda.cudaStreamEndCapture(stream)
    _, ready = cuda.cudaGraphInstantiate(graph, 0)
    cuda.cudaFree(address)
    with pytest.raises(StandinError, match="was freed"):
        cuda.cudaGraphLaunch(ready, stream)


def test_more_memory_than_there_is(cuda: FakeCuda) -> None:
    memory(cuda, 9_000)
    assert cuda.cudaMemGetInfo() == (0, 1_000, 10_000)
    assert cuda.cudaMalloc(1_001) == (Error.cudaErrorMemoryAllocation, None)


CAPTURING = (Error.cudaErrorStreamCaptureUnsupported,)


@pytest.mark.parametrize(
    "act",
    [
        lambda c, s, a, h: c.cudaStreamSynchronize(s),
        lambda c, s, a, h: c.cudaStreamBeginCapture(s, LOCAL),
        lambda c, s, a, h: c.cudaMalloc(1)[:1],
        lambda c, s, a, h: c.cudaFree(a),
        lambda c, s, a, h: c.cudaMemcpyAsync(a, h, 4, UP, s),
        lambda c, s, a, h: c.cudaMemcpyAsync(h, a, 4, DOWN, s),
        lambda c, s, a, h: c.cudaEventSynchronize(c.cudaEventCreateWithFlags(1)[1]),
    ],
)
def test_what_must_not_be_captured(act: Act, cuda: FakeCuda, stream: Any) -> None:
    address, host = memory(cuda), np.zeros(4, np.uint8)
    cuda.cudaStreamBeginCapture(stream, LOCAL)
    assert act(cuda, stream, address, host.ctypes.data) == CAPTURING


def test_a_spoilt_capture(cuda: FakeCuda, stream: Any) -> None:
    cuda.cudaStreamBeginCapture(stream, LOCAL)
    cuda.cudaStreamSynchronize(stream)
    invalid = Error.cudaErrorStreamCaptureInvalidated
    assert cuda.cudaStreamEndCapture(stream) == (invalid, None)
    assert cuda.cudaStreamEndCapture(stream) == (Error.cudaErrorInvalidValue, None)
    assert cuda.cudaStreamSynchronize(stream) == (0,)


def test_an_event_in_a_capture_is_no_mark(cuda: FakeCuda, stream: Any) -> None:
    _, event = cuda.cudaEventCreateWithFlags(1)
    cuda.cudaStreamBeginCapture(stream, LOCAL)
    cuda.cudaEventRecord(event, stream)
    assert cuda.cudaEventSynchronize(event) == (Error.cudaErrorCapturedEvent,)
    assert cuda.cudaEventElapsedTime(event, event)[0] == Error.cudaErrorInvalidResourceHandle


def test_a_stream_that_is_captured_is_not_destroyed(cuda: FakeCuda, stream: Any) -> None:
    cuda.cudaStreamBeginCapture(stream, LOCAL)
    with pytest.raises(StandinError, match="while it is captured"):
        cuda.cudaStreamDestroy(stream)


@pytest.mark.parametrize(
    "act",
    [
        lambda c, s, gone: c.cudaStreamSynchronize(gone),
        lambda c, s, gone: c.cudaStreamDestroy(gone),
        lambda c, s, gone: c.cudaStreamBeginCapture(gone, LOCAL),
        lambda c, s, gone: c.cudaStreamEndCapture(gone)[:1],
        lambda c, s, gone: c.cudaMemsetAsync(memory(c), 0, 4, gone),
        lambda c, s, gone: c.cudaMemcpyAsync(memory(c), memory(c), 4, WITHIN, gone),
        lambda c, s, gone: c.cudaGraphInstantiate(gone, 0)[:1],
        lambda c, s, gone: c.cudaGraphLaunch(gone, s),
        lambda c, s, gone: c.cudaGraphDestroy(gone),
        lambda c, s, gone: c.cudaGraphExecDestroy(gone),
        lambda c, s, gone: c.cudaEventRecord(gone, s),
        lambda c, s, gone: c.cudaEventSynchronize(gone),
        lambda c, s, gone: c.cudaEventDestroy(gone),
    ],
)
def test_handles_that_are_gone(act: Any, cuda: FakeCuda, stream: Any) -> None:
    _, gone = cuda.cudaStreamCreateWithFlags(1)
    cuda.cudaStreamDestroy(gone)
    assert act(cuda, stream, gone) == (Error.cudaErrorInvalidResourceHandle,)


def test_handles_of_another_kind(cuda: FakeCuda, stream: Any) -> None:
    assert cuda.cudaEventRecord(stream, stream) == (Error.cudaErrorInvalidResourceHandle,)
    assert cuda.live_handles() == ["Stream"]


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"driver": 11080}, Error.cudaErrorInsufficientDriver),
        ({"devices": 0}, Error.cudaErrorNoDevice),
    ],
)
def test_no_device(settings: dict[str, Any], error: Error) -> None:
    assert FakeCuda(**settings).cudaGetDeviceCount() == (error, None)


def test_devices_that_are_not_there(cuda: FakeCuda) -> None:
    assert cuda.cudaSetDevice(1) == (Error.cudaErrorInvalidDevice,)
    assert cuda.cudaGetDeviceProperties(1) == (Error.cudaErrorInvalidDevice, None)


def test_what_is_counted(cuda: FakeCuda, stream: Any) -> None:
    address = memory(cuda)
    cuda.cudaMemcpyAsync(address, address + 32, 32, WITHIN, stream)
    assert cuda.counts["cudaMemcpyAsync"] == 1
    assert (cuda.log[-1].name, cuda.log[-1].kind) == ("cudaMemcpyAsync", "device to device")
    assert cuda.live_allocations() == {address: 64}
    assert cuda.pending(stream) == ["copy"]
