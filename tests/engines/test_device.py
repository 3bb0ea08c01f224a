"""The device: order, memory, graphs and events, on a stand-in that shows every mistake."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sld_edge.engines.cuda.device import ALIGNMENT, Arena, Device, DeviceTensor, cuda_runtime
from sld_edge.engines.errors import EngineError, MissingPackageError
from standin.cuda import FakeCuda, StandinError

LAYOUT: dict[str, tuple[str, tuple[int, ...]]] = {
    "a": ("float32", (3, 5)),
    "b": ("uint8", (7,)),
    "c": ("float32", (3, 5)),
}
ONES = np.ones((3, 5), np.float32)


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda()


@pytest.fixture
def device(cuda: FakeCuda) -> Iterator[Device]:
    device = Device(cuda=cuda)
    yield device
    device.close()
    assert not cuda.live_allocations()
    assert not cuda.live_handles()


@pytest.fixture
def arena(device: Device) -> Iterator[Arena]:
    arena = Arena(device, LAYOUT)
    yield arena
    arena.close()


def test_a_device_says_what_it_is() -> None:
    cuda = FakeCuda(
        compute_capability=(8, 7), name="Orin", driver=12060, integrated=True, total_memory=1 << 20
    )
    device = Device(cuda=cuda)
    assert (device.name, device.compute_capability, device.driver) == ("Orin", "8.7", "12.6")
    assert device.integrated
    device.allocate(1000)
    assert device.memory() == ((1 << 20) - 1000, 1 << 20)


@pytest.mark.parametrize(
    ("settings", "index", "says"),
    [
        ({"devices": 0}, 0, "cudaGetDeviceCount failed | got no CUDA-capable device"),
        ({"devices": 0}, 0, "use --provider cpu"),
        ({"driver": 11080}, 0, "update the NVIDIA driver, or use --provider cpu"),
        ({"devices": 2}, 2, "no CUDA device 2 | got 2 devices"),
    ],
)
def test_no_device(settings: dict[str, Any], index: int, says: str) -> None:
    with pytest.raises(EngineError) as caught:
        Device(index, cuda=FakeCuda(**settings))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


class WithoutDriver(FakeCuda):
    """As cuda-bindings 12.8.0 answers where there is no driver; later versions return an error."""

    def cudaDriverGetVersion(self) -> Any:  # noqa: N802
        raise RuntimeError("Failed to dlopen libcuda.so.1")


def test_bindings_that_raise_without_a_driver() -> None:
    with pytest.raises(EngineError) as caught:
        Device(cuda=WithoutDriver())
    assert str(caught.value) == (
        "CUDA: cudaDriverGetVersion does not reach the NVIDIA driver | got Failed to dlopen "
        "libcuda.so.1 | install the driver if there is a GPU, or use --provider cpu"
    )


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="for a machine without a GPU")
def test_the_installed_bindings_without_a_driver() -> None:
    pytest.importorskip("cuda.bindings.runtime")
    with pytest.raises(EngineError, match=r"NVIDIA driver.*install"):
        Device()


def test_no_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(MissingPackageError, match="cuda-bindings"):
        cuda_runtime()


def test_out_of_memory_says_what_helps() -> None:
    device = Device(cuda=FakeCuda(total_memory=1000))
    with pytest.raises(EngineError, match=r"cudaMalloc failed .* out of memory .*--low-memory"):
        device.allocate(1001)
    device.free(device.allocate(1000))  # the refusal took nothing


def test_what_goes_up_comes_down(device: Device, arena: Arena) -> None:
    array = np.arange(15, dtype=np.float32).reshape(5, 3).T  # not contiguous
    device.upload(arena["a"], array)
    np.testing.assert_array_equal(device.download(arena["a"]), array)


def test_an_uploaded_array_may_be_changed_at_once(device: Device, arena: Arena) -> None:
    array = ONES.copy()
    device.upload(arena["a"], array)
    array[:] = 7
    np.testing.assert_array_equal(device.download(arena["a"]), ONES)


@pytest.mark.parametrize("array", [ONES.T, ONES.astype(np.float64)], ids=["shape", "dtype"])
def test_an_array_of_another_kind_is_a_mistake(array: Any, device: Device, arena: Arena) -> None:
    with pytest.raises(ValueError, match="DeviceTensor"):
        device.upload(arena["a"], array)


def test_work_is_done_in_order(device: Device, arena: Arena) -> None:
    a, c = arena["a"], arena["c"]
    device.copy(c.address, a.address, a.nbytes)  # still what malloc left: NaN
    early = device.download(c)
    device.upload(a, ONES)
    device.copy(c.address, a.address, a.nbytes)
    device.clear(a)
    assert np.isnan(early).all()
    np.testing.assert_array_equal(device.download(c), ONES)
    np.testing.assert_array_equal(device.download(a), 0 * ONES)


def test_an_arena_lays_out_aligned_and_apart(device: Device, arena: Arena) -> None:
    tensors = [arena[name] for name in LAYOUT]
    for one, following in pairwise(tensors):
        assert following.address >= one.address + one.nbytes
    assert all(tensor.address % ALIGNMENT == 0 for tensor in tensors)
    assert tensors[-1].address + tensors[-1].nbytes <= arena.address + arena.nbytes
    assert arena.holds(dict(LAYOUT))
    assert not arena.holds({**LAYOUT, "c": ("float32", (3, 4))})


def test_a_span_is_everything_between(device: Device, arena: Arena) -> None:
    span = arena.span("a", "b")
    assert (span.address, span.dtype) == (arena["a"].address, "uint8")
    assert span.address + span.nbytes == arena["b"].address + 7
    device.clear(span)
    assert not device.download(arena["b"]).any()


def test_a_part_is_rows_of_the_same_memory(device: Device, arena: Arena) -> None:
    array = np.arange(15, dtype=np.float32).reshape(3, 5)
    device.upload(arena["a"], array)
    part = arena["a"].part(1, 2)
    assert (part.shape, part.nbytes) == ((2, 5), 40)
    np.testing.assert_array_equal(device.download(part), array[1:])


def test_memory_is_freed_once_queued_work_is_done(device: Device) -> None:
    arena = Arena(device, LAYOUT)
    device.clear(arena["a"])
    arena.close()
    with pytest.raises(StandinError, match="was freed"):
        device.clear(arena["a"])


def test_freeing_twice_is_one_line(device: Device) -> None:
    address = device.allocate(10)
    device.free(address)
    with pytest.raises(EngineError, match=r"CUDA: cudaFree failed \| got invalid argument"):
        device.free(address)


def test_a_graph_is_recorded_and_replayed(cuda: FakeCuda, device: Device, arena: Arena) -> None:
    a, c = arena["a"], arena["c"]

    def queue() -> None:
        device.copy(c.address, a.address, a.nbytes)
        device.clear(a)

    device.upload(a, ONES)
    graph = device.capture(queue)
    np.testing.assert_array_equal(device.download(a), ONES)  # nothing was run
    assert np.isnan(device.download(c)).all()
    for number in (1, 2):
        device.upload(a, number * ONES)
        graph.launch()
        np.testing.assert_array_equal(device.download(c), number * ONES)
        np.testing.assert_array_equal(device.download(a), 0 * ONES)
    assert cuda.counts["cudaGraphLaunch"] == 2
    graph.close()
    with pytest.raises(EngineError, match="cudaGraphLaunch failed .* invalid resource handle"):
        graph.launch()


@pytest.mark.parametrize("what", ["upload", "download", "allocate", "wait"])
def test_what_cannot_be_captured_is_refused(what: str, device: Device, arena: Arena) -> None:
    event = device.event()
    event.record()

    def queue() -> None:
        {
            "upload": lambda: device.upload(arena["a"], ONES),
            "download": lambda: device.download(arena["a"]),
            "allocate": lambda: device.allocate(10),
            "wait": event.wait,
        }[what]()

    with pytest.raises(EngineError, match="not permitted when stream is capturing"):
        device.capture(queue)
    event.close()
    device.upload(arena["a"], ONES)  # the stream goes on
    np.testing.assert_array_equal(device.download(arena["a"]), ONES)


def test_a_mistake_while_capturing_ends_the_capture(device: Device, arena: Arena) -> None:
    def queue() -> None:
        device.clear(arena["a"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        device.capture(queue)
    device.upload(arena["a"], ONES)
    np.testing.assert_array_equal(device.download(arena["a"]), ONES)


def test_a_spoilt_capture_gives_no_graph(cuda: FakeCuda, device: Device, arena: Arena) -> None:
    def queue() -> None:
        device.clear(arena["a"])
        cuda.cudaStreamSynchronize(device.stream)  # its error is not looked at

    with pytest.raises(EngineError, match="cudaStreamEndCapture failed .* earlier capture"):
        device.capture(queue)


def test_the_workspace_grows_and_says_so(device: Device) -> None:
    workspace = device.workspace
    assert (workspace.address, workspace.generation) == (0, 0)
    workspace.require(100)
    first = workspace.address
    workspace.require(80)
    assert (workspace.address, workspace.nbytes, workspace.generation) == (first, 100, 1)
    device.clear(DeviceTensor(first, "uint8", (100,)))  # growing waits for it
    workspace.require(101)
    assert workspace.nbytes == 101
    assert workspace.generation > 1
    assert workspace.address != first
    assert device.memory()[1] - device.memory()[0] == 101  # the old one was given back


def test_an_event_is_waited_for_and_no_further(
    cuda: FakeCuda, device: Device, arena: Arena
) -> None:
    first, second = device.event(), device.event()
    first.record()
    device.clear(arena["a"])
    second.record()
    device.clear(arena["b"])
    with pytest.raises(EngineError, match=r"cudaEventElapsedTime failed \| got device not ready"):
        second.seconds_since(first)
    assert cuda.pending(device.stream) == ["event", "memset", "event", "memset"]
    second.wait()
    assert cuda.pending(device.stream) == ["memset"]
    assert 0 < second.seconds_since(first) < 60
    first.close()
    second.close()


def test_an_event_is_where_it_was_recorded_last(device: Device, arena: Arena) -> None:
    event, other = device.event(), device.event()
    event.record()
    other.record()
    event.record()
    event.wait()
    assert event.seconds_since(other) > 0
    event.close()
    other.close()
