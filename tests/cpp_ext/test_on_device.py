"""The CUDA function on a GPU, where one is here: against the CPU function, and captured."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from c_library import NVCC, Feeds, Step, bound, empty_outputs, installed_by, opened
from sld_edge.engines.cuda.device import Arena, Device
from sld_edge.engines.errors import UserError

SUMS = ("share", "strength", "concept_strength", "finite")  # in another order than on the CPU


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    try:
        gpu = Device()
    except UserError as error:  # no driver, no GPU, no cuda-bindings
        pytest.skip(f"no GPU here: {error}")
    yield gpu
    gpu.close()


@pytest.fixture(scope="module")
def native(device: Device, cmake: str, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if NVCC is None:
        pytest.skip("no nvcc here")
    folder, number = tmp_path_factory.mktemp("cuda"), device.compute_capability.replace(".", "")
    options = [f"-DCMAKE_CUDA_COMPILER={NVCC}", f"-DCMAKE_CUDA_ARCHITECTURES={number}"]
    installed: Path = installed_by(cmake, folder, "-DSLD_EDGE_CUDA=ON", *options)
    return opened(installed / "lib" / "libsld_edge.so")


@pytest.mark.parametrize("concepts", [1, 3, 64])
@pytest.mark.parametrize("half", [False, True])
def test_a_device_gives_the_latents_of_the_cpu(
    device: Device,
    native: ctypes.CDLL,
    c_step: Step,
    make_feeds: Callable[..., Feeds],
    half: bool,
    concepts: int,
) -> None:
    feeds = make_feeds(3, concepts, 37, 31, half=half)
    wanted, outputs = c_step(feeds), empty_outputs(feeds)
    arrays = {**feeds, **outputs}
    step = bound(feeds, outputs)
    size = native.sld_edge_cuda_workspace_bytes(ctypes.byref(step))
    shapes = {name: (str(array.dtype), array.shape) for name, array in arrays.items()}
    arena = Arena(device, {**shapes, "workspace": ("uint8", (size,))})
    for name, array in arrays.items():
        setattr(step, name, arena[name].address)
        device.upload(arena[name], array)
    workspace, stream = (ctypes.c_void_p(n) for n in (arena["workspace"].address, device.stream))
    statuses: list[int] = []

    def queue() -> None:
        start = native.sld_edge_safe_step_cuda
        statuses.append(start(ctypes.byref(step), workspace, ctypes.c_size_t(size), stream))

    for start in (queue, device.capture(queue).launch):
        for name, array in outputs.items():
            device.upload(arena[name], np.full_like(array, np.nan))
        start()
        got = {name: device.download(arena[name]) for name in outputs}
        for name, array in got.items():
            rtol = 1e-6 if name in SUMS else 0
            np.testing.assert_allclose(array, wanted[name], rtol=rtol, atol=0, err_msg=name)
    assert statuses == [0, 0]
    arena.close()
