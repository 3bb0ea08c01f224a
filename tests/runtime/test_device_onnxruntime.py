"""ONNX Runtime on a device: bound by address, on our stream, the loop staying there.

ONNX Runtime's CUDA provider is not here, so its session is replaced by one that computes on the CPU
when the stand-in for CUDA comes to it; everything of ours, and the real I/O binding's signature,
are the real ones.
"""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import standin
from oracles.prepared import prepared_engine
from sld_edge.engines.base import Array
from sld_edge.engines.cuda.device import Arena, Device
from sld_edge.engines.errors import EngineError
from sld_edge.engines.onnxruntime.engine import (
    PROVIDERS,
    OrtEngine,
    create_session,
    heavy_on_cpu,
    provider_options,
    session_options,
)
from sld_edge.engines.onnxruntime.on_device import OrtDeviceEngine
from sld_edge.engines.providers import ProviderStatus
from sld_edge.runtime import Pipeline
from sld_edge.runtime.bundle import EMBEDDED
from sld_edge.runtime.commands.run import main
from standin.cuda import FakeCuda, Work
from standin.plans import make_plans

GRAPH = EMBEDDED / "guidance.onnx"
UNET = EMBEDDED / "unet.onnx"


@dataclass
class FakeBinding:
    """Keeps what the real `IOBinding` is given."""

    inputs: dict[str, tuple[np.dtype[Any], list[int], int]] = field(default_factory=dict)
    outputs: dict[str, tuple[np.dtype[Any], list[int], int]] = field(default_factory=dict)

    def bind_input(
        self, name: str, device: str, index: int, dtype: Any, shape: list[int], address: int
    ) -> None:
        assert (device, index) == ("cuda", 0)
        self.inputs[name] = (np.dtype(dtype), shape, address)

    def bind_output(
        self, name: str, device: str, index: int, dtype: Any, shape: list[int], address: int
    ) -> None:
        assert (device, index) == ("cuda", 0)
        self.outputs[name] = (np.dtype(dtype), shape, address)


class FakeSession:
    """A session on the stand-in: what it is bound to is read and written when its turn comes."""

    def __init__(self, path: Path, cuda: FakeCuda, stream: int) -> None:
        digest = f"{path.name}{path.stat().st_size}"
        self._engine: OrtEngine = prepared_engine(digest, lambda: path)
        self._cuda, self._stream = cuda, stream

    def get_inputs(self) -> Any:
        return self._engine.session.get_inputs()

    def get_outputs(self) -> Any:
        return self._engine.session.get_outputs()

    def run(self, names: list[str], feeds: dict[str, Array]) -> list[Array]:
        return [self._engine.run(feeds)[name] for name in names]

    def io_binding(self) -> FakeBinding:
        return FakeBinding()

    def run_with_iobinding(self, binding: FakeBinding, options: Any) -> None:
        key = "disable_synchronize_execution_providers"
        assert options.get_run_config_entry(key) == "1"
        everything = {**binding.inputs, **binding.outputs}

        def view(name: str) -> Array:
            dtype, shape, address = everything[name]
            nbytes = int(np.prod(shape)) * dtype.itemsize
            return self._cuda.view(address, nbytes).view(dtype).reshape(shape)

        def run() -> None:
            given = {name: view(name).copy() for name in binding.inputs}
            for name, array in self._engine.run(given).items():
                view(name)[...] = array

        spans = tuple(
            (address, int(np.prod(shape)) * dtype.itemsize)
            for dtype, shape, address in everything.values()
        )
        self._cuda.enqueue(self._stream, Work(name="kernel", run=run, spans=spans))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = standin.install(monkeypatch)

    def create(path: Path, options: Any, provider: str, device: Device | None = None) -> Any:
        if provider == "cpu" or device is None:
            return create_session(path, options, "cpu")
        return FakeSession(path, fake, device.stream)

    def works(name: str) -> ProviderStatus:
        return ProviderStatus(name=name, usable=True, reason="", version="", devices=())

    monkeypatch.setattr("sld_edge.engines.onnxruntime.engine.create_session", create)
    monkeypatch.setattr("sld_edge.runtime.loader.status", works)
    return fake


@pytest.mark.skipif(
    not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"),
    reason="this ONNX Runtime keeps no record: 1.23.2, of Python 3.10",
)
def test_what_a_provider_leaves_to_the_cpu_is_counted() -> None:
    """On a session of the CPU, which gets everything; ONNX Runtime's own record."""
    options = session_options()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    found = heavy_on_cpu(create_session(UNET, options, "cpu"))
    nodes = Counter(
        node.op_type for node in onnx.load(str(UNET), load_external_data=False).graph.node
    )
    assert found == {op: nodes[op] for op in ("Attention", "Conv", "Gemm", "MatMul") if nodes[op]}
    assert found["Attention"] == 14


def test_nodes_left_to_the_cpu_are_said(
    cuda: FakeCuda,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def counted(session: Any) -> dict[str, int]:
        assert isinstance(session, FakeSession)
        return {"Attention": 14}

    monkeypatch.setattr("sld_edge.engines.onnxruntime.engine.heavy_on_cpu", counted)
    output = tmp_path / "picture.png"
    code = main(["a red star", "--provider", "cuda", "--steps", "2", "--output", str(output)])
    said = capsys.readouterr().err
    assert code == 0
    assert "warning: unet: cuda left 14 Attention to the cpu, which is slow: update" in said


@pytest.mark.parametrize("provider", ["cuda", "ort-tensorrt", "ort-tensorrt-rtx"])
@pytest.mark.parametrize(
    "settings",
    [
        {"safety": "weak"},
        {"sampler": "euler-a"},
        {"count": 2, "guidance_scale": 1},
        {"cache_interval": 2},
    ],
    ids=str,
)
def test_the_device_makes_what_the_cpu_makes(
    provider: str, settings: dict[str, Any], cuda: FakeCuda, miniature: Pipeline
) -> None:
    given = {"steps": 7, "seed": 3, "batch_size": settings.get("count", 1), **settings}
    with Pipeline.load(provider=provider) as pipeline:
        got = pipeline("a red star at a party", **given)
        assert set(pipeline.providers.values()) == {provider}
    wanted = miniature("a red star at a party", **given)
    np.testing.assert_array_equal(got.latents, wanted.latents)
    np.testing.assert_array_equal(got.edit_maps, wanted.edit_maps)
    assert got.images[0].tobytes() == wanted.images[0].tobytes()
    assert not cuda.live_allocations()


def test_plans_and_sessions_share_the_loop(
    cuda: FakeCuda, miniature: Pipeline, tmp_path: Path
) -> None:
    """A plan for the UNet, ONNX Runtime for guidance: still nothing leaves the device."""
    bundle = Path(shutil.copytree(EMBEDDED, tmp_path / "mini"))
    make_plans(
        bundle,
        engine="tensorrt",
        version="10.3.0",
        compute_capabilities=("8.6",),
        size=(64, 64, 64),
        components=("unet",),
    )
    with Pipeline.load(bundle, provider="tensorrt") as pipeline:
        got = pipeline("a red star", steps=4)
        assert pipeline._executor.stage is not None  # the loop on the device
        assert pipeline.providers["guidance"] == "cuda"
    np.testing.assert_array_equal(got.latents, miniature("a red star", steps=4).latents)


def test_a_tensor_that_does_not_fit_is_named(cuda: FakeCuda) -> None:
    device = Device()
    with OrtDeviceEngine(UNET, device, provider="cuda") as engine:
        layout = {
            "latents": ("float32", (1, 4, 8, 8)),
            "timestep": ("float32", (1,)),
            "context": ("float32", (3, 24, 96)),
            "noise_pred": ("float32", (3, 4, 8, 8)),
            "deep": ("float32", (3, 48, 8, 8)),
        }
        arena = Arena(device, {**layout, "more": ("float32", (1,)), "half": ("float16", (1,))})
        tensors = {name: arena[name] for name in layout}
        engine.bind(tensors)
        with pytest.raises(EngineError, match="tensor timestep | got nothing"):
            engine.bind({name: tensors[name] for name in layout if name != "timestep"})
        with pytest.raises(EngineError, match=r"no such tensor \| got more"):
            engine.bind({**tensors, "more": arena["more"]})
        with pytest.raises(EngineError, match=r"tensor timestep \| got float16 \[1\] \| expected"):
            engine.bind({**tensors, "timestep": arena["half"]})


def test_the_real_binding_takes_what_it_is_given() -> None:
    """The same calls on the CPU provider, whose memory the host can look at."""
    session = OrtEngine(GRAPH).session
    binding = session.io_binding()
    rng = np.random.default_rng(0)
    sizes = {"B": 1, "n": 2, "h": 8, "w": 8}
    arrays = {
        argument.name: rng.standard_normal(
            [sizes.get(size, size) for size in argument.shape], np.float32
        )
        for argument in (*session.get_inputs(), *session.get_outputs())
    }
    names = {argument.name for argument in session.get_inputs()}
    wanted = session.run(None, {name: arrays[name] for name in names})
    for name, array in arrays.items():
        bind = binding.bind_input if name in names else binding.bind_output
        bind(name, "cpu", 0, array.dtype, list(array.shape), array.ctypes.data)
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")
    session.run_with_iobinding(binding, options)
    for argument, array in zip(session.get_outputs(), wanted, strict=True):
        np.testing.assert_array_equal(arrays[argument.name], array)


def test_what_onnxruntime_goes_on_without_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for a provider that does not start, ONNX Runtime takes the CPU and only warns."""
    standin.install(monkeypatch)
    with pytest.raises(EngineError, match="could not start CUDAExecutionProvider here"):
        OrtEngine(GRAPH, provider="cuda", device=Device())


def test_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SLD_EDGE_CACHE", str(tmp_path))
    standin.install(monkeypatch)
    device = Device()
    for provider in ("cuda", "ort-tensorrt", "ort-tensorrt-rtx"):
        options = provider_options(provider, device)
        assert options["user_compute_stream"] == str(device.stream)
        assert all(isinstance(value, str) for value in options.values())
    assert provider_options("ort-tensorrt", device)["trt_engine_cache_path"].startswith(
        str(tmp_path)
    )
    assert provider_options("cpu", None) == {}
    assert set(PROVIDERS) == {"cpu", "cuda", "ort-tensorrt", "ort-tensorrt-rtx"}
