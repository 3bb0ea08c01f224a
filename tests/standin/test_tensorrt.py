"""The TensorRT stand-in refuses what TensorRT refuses: every refusal is provoked."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import standin
from sld_edge.engines.tensorrt.plan_info import Flavour
from sld_edge.runtime.bundle import EMBEDDED
from standin.cuda import FakeCuda, StandinError
from standin.plans import VERSIONS, make_plans
from standin.tensorrt import (
    CudaEngine,
    ExecutionContext,
    ExecutionContextAllocationStrategy,
    ILogger,
    OnnxParserRefitter,
    Refitter,
    RuntimeConfig,
    TensorIOMode,
    TensorRTModule,
    make_tensorrt,
)

MANAGED = ExecutionContextAllocationStrategy.USER_MANAGED
SHAPES = {"latents": (2, 4, 16, 16), "images": (2, 64, 64, 3), "finite": (2,)}
BYTES = {"latents": 2 * 4 * 256 * 4, "images": 2 * 64 * 64 * 3, "finite": 8}


class Logger(ILogger):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def log(self, severity: Any, msg: str) -> None:
        self.lines.append(msg)


class Setup:
    """A decoder's plan on a device, up to the point where a test takes over."""

    def __init__(self, bundle: Path, flavour: Flavour = "tensorrt", **settings: Any) -> None:
        self.cuda = FakeCuda()
        self.trt: Any = make_tensorrt(flavour, VERSIONS[flavour], self.cuda)
        self.logger = Logger()
        given: dict[str, Any] = {"engine": flavour, "components": ["vae_decoder"], **settings}
        self.plan = make_plans(bundle, **given)["vae_decoder"].path
        _, self.stream = self.cuda.cudaStreamCreateWithFlags(1)

    def load(self, **runtime: Any) -> CudaEngine | None:
        loader = self.trt.Runtime(self.logger)
        for name, value in runtime.items():
            setattr(loader, name, value)
        engine: CudaEngine | None = loader.deserialize_cuda_engine(self.plan.read_bytes())
        return engine

    def engine(self) -> CudaEngine:
        engine = self.load()
        assert engine is not None, self.logger.lines
        return engine

    def context(self, engine: CudaEngine | None = None) -> ExecutionContext:
        """A context with everything set."""
        engine = engine if engine is not None else self.engine()
        context = engine.create_execution_context(MANAGED)
        assert context is not None
        assert context.set_optimization_profile_async(0, self.stream)
        assert context.set_input_shape("latents", SHAPES["latents"])
        self.addresses = {name: self.malloc(size) for name, size in BYTES.items()}
        for name, address in self.addresses.items():
            assert context.set_tensor_address(name, address)
        need = context.update_device_memory_size_for_shapes()
        context.set_device_memory(self.malloc(need), need)
        return context

    def malloc(self, size: int) -> int:
        return int(self.cuda.cudaMalloc(size)[1])

    def last(self) -> str:
        return self.logger.lines[-1]


@pytest.fixture
def setup(tmp_path: Path) -> Callable[..., Setup]:
    def make(flavour: Flavour = "tensorrt", **settings: Any) -> Setup:
        bundle = tmp_path / f"bundle{len(list(tmp_path.iterdir()))}"
        return Setup(Path(shutil.copytree(EMBEDDED, bundle)), flavour, **settings)

    return make


@pytest.fixture
def ready(setup: Callable[..., Setup]) -> Setup:
    return setup()


def test_a_run_reads_and_writes_when_its_turn_comes(ready: Setup) -> None:
    context = ready.context()
    assert context.execute_async_v3(ready.stream)
    finite = ready.cuda.view(ready.addresses["finite"], 8).view(np.float32)
    assert np.isnan(finite).all()
    ready.cuda.view(ready.addresses["latents"], BYTES["latents"])[:] = 0  # after it was queued
    ready.cuda.cudaStreamSynchronize(ready.stream)
    assert (finite == 1).all()  # NaN would have made it 0
    assert ready.cuda.kernels == ["vae_decoder"]


def test_activation_memory_is_overwritten(ready: Setup) -> None:
    context = ready.context()
    need = context.update_device_memory_size_for_shapes()
    workspace = ready.malloc(need)
    context.set_device_memory(workspace, need)
    ready.cuda.view(workspace, need)[:] = 0
    context.execute_async_v3(ready.stream)
    ready.cuda.cudaStreamSynchronize(ready.stream)
    assert ready.cuda.view(workspace, need).all()


# --- plans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"version": "10.3.1"}, "version tag 10.3.1 does not match 10.3.0"),
        ({"engine": "tensorrt-rtx"}, "one of tensorrt-rtx"),
        ({"compute_capabilities": ("8.7", "8.9")}, "not for compute capability 8.6"),
        ({"options": {"version_compatible": True}}, "host code, which is not allowed"),
    ],
)
def test_plans_for_something_else(
    settings: dict[str, Any], says: str, setup: Callable[..., Setup]
) -> None:
    made = setup(**settings)
    assert made.load() is None
    assert says in made.last()


def test_a_version_compatible_plan(setup: Callable[..., Setup]) -> None:
    made = setup(version="10.1.0", options={"version_compatible": True})
    assert made.load(engine_host_code_allowed=True) is not None
    later = setup(version="10.4.0", options={"version_compatible": True})
    assert later.load(engine_host_code_allowed=True) is None
    assert "later version" in later.last()


def test_a_hardware_compatible_plan(setup: Callable[..., Setup]) -> None:
    made = setup(compute_capabilities=("8.0",), options={"hardware_compatible": True})
    assert made.load() is not None
    made.cuda.compute_capability = (7, 5)
    assert made.load() is None
    assert "older than Ampere" in made.last()


def test_what_is_no_plan(ready: Setup) -> None:
    ready.plan.write_bytes(b'{"magic": "other"}')
    assert ready.load() is None
    assert "not a plan" in ready.last()
    with pytest.raises(TypeError):
        ready.trt.Runtime(ready.logger).deserialize_cuda_engine("a path")


def test_a_logger_that_was_not_constructed(ready: Setup) -> None:
    class Careless(ILogger):
        def __init__(self) -> None:
            pass

    for logger in (Careless(), object()):
        with pytest.raises(TypeError, match="__init__"):
            ready.trt.Runtime(logger)
    with pytest.raises(NotImplementedError):
        ILogger().log(ILogger.ERROR, "nobody listens")


def test_a_stripped_plan_needs_its_own_weights(setup: Callable[..., Setup]) -> None:
    made = setup(options={"strip_weights": True})
    engine = made.engine()
    context = made.context(engine)
    assert not context.execute_async_v3(made.stream)
    assert "stripped of its weights" in made.last()
    refitter = Refitter(engine, made.logger)
    parser = OnnxParserRefitter(refitter, made.logger)
    assert not parser.refit_from_file(str(EMBEDDED / "unet.onnx"))
    assert not refitter.refit_cuda_engine()
    assert refitter.get_missing_weights()
    assert parser.refit_from_file(str(EMBEDDED / "vae_decoder.onnx"))
    assert not context.execute_async_v3(made.stream)  # read, and not carried out yet
    assert refitter.refit_cuda_engine()
    assert not refitter.get_missing_weights()
    assert context.execute_async_v3(made.stream)
    with pytest.raises(TypeError):
        parser.refit_from_file(EMBEDDED / "vae_decoder.onnx")  # type: ignore[arg-type]  # on purpose


def test_a_whole_plan_is_not_refitted(ready: Setup) -> None:
    with pytest.raises(TypeError, match="not built to be refitted"):
        Refitter(ready.engine(), ready.logger)


# --- contexts -------------------------------------------------------------------------------------


def test_shapes_outside_the_profile(ready: Setup) -> None:
    context = ready.context()
    for name, shape, says in (
        ("latents", (5, 4, 16, 16), "outside the profile"),
        ("latents", (1, 4, 16, 15), "outside the profile"),
        ("latents", (1, 4, 16), "has 4 dimensions"),
        ("images", SHAPES["images"], "images is no input"),
        ("other", (1,), "other is no input"),
    ):
        assert not context.set_input_shape(name, shape)
        assert says in ready.last()
    with pytest.raises(TypeError):
        context.set_input_shape("latents", np.array([1, 4, 16, 16]))  # type: ignore[arg-type]


def test_profiles_and_streams_that_are_not_there(ready: Setup) -> None:
    context = ready.context()
    assert not context.set_optimization_profile_async(1, ready.stream)
    assert not context.set_optimization_profile_async(0, 0)
    assert not context.execute_async_v3(0)
    assert "no such stream" in ready.last()


def test_names_that_are_not_there(ready: Setup) -> None:
    engine = ready.engine()
    assert engine.get_tensor_mode("other") == TensorIOMode.NONE
    with pytest.raises(StandinError, match="does not have"):
        engine.get_tensor_shape("other")
    with pytest.raises(StandinError, match="no shapes of images"):
        engine.get_tensor_profile_shape("images", 0)
    assert not ready.context(engine).set_tensor_address("other", 0)


def test_shapes_follow_from_the_inputs(ready: Setup) -> None:
    engine = ready.engine()
    assert tuple(engine.get_tensor_shape("images")) == (-1, -1, -1, 3)
    context = engine.create_execution_context(MANAGED)
    assert context is not None
    assert context.infer_shapes() == ["latents"]
    assert tuple(context.get_tensor_shape("images")) == (-1, -1, -1, 3)
    context.set_input_shape("latents", SHAPES["latents"])
    assert context.infer_shapes() == []
    assert {name: tuple(context.get_tensor_shape(name)) for name in SHAPES} == SHAPES


def test_shapes_that_contradict_each_other(setup: Callable[..., Setup], tmp_path: Path) -> None:
    made = setup()
    bundle = made.plan.parent
    made.plan = make_plans(bundle, engine="tensorrt", components=["unet"])["unet"].path
    context = made.engine().create_execution_context(MANAGED)
    assert context is not None
    context.set_input_shape("latents", (2, 4, 16, 16))
    context.set_input_shape("timestep", (2,))
    context.set_input_shape("context", (5, 24, 96))
    with pytest.raises(RuntimeError, match="5 branches of 2 images"):
        context.infer_shapes()
    context.set_input_shape("context", (6, 24, 96))
    context.set_input_shape("timestep", (3,))
    with pytest.raises(RuntimeError, match="dimension B is 2 and 3"):
        context.infer_shapes()


def test_a_run_before_everything_is_set(ready: Setup) -> None:
    context = ready.engine().create_execution_context(MANAGED)
    assert context is not None
    with pytest.raises(StandinError, match="before all shapes"):
        context.update_device_memory_size_for_shapes()
    assert not context.execute_async_v3(ready.stream)
    assert "no shape for latents" in ready.last()
    context.set_input_shape("latents", SHAPES["latents"])
    assert not context.execute_async_v3(ready.stream)
    assert "no address for latents" in ready.last()
    for name, size in BYTES.items():
        context.set_tensor_address(name, ready.malloc(size))
    assert not context.execute_async_v3(ready.stream)
    assert "activation memory needed, 0 given" in ready.last()
    need = context.update_device_memory_size_for_shapes()
    context.set_device_memory(ready.malloc(need), need - 1)
    assert not context.execute_async_v3(ready.stream)
    context.set_device_memory(ready.malloc(need), need)
    assert context.execute_async_v3(ready.stream)


def test_larger_shapes_need_more_memory(ready: Setup) -> None:
    context = ready.context()
    assert context.set_input_shape("latents", (4, 4, 16, 16))
    assert not context.execute_async_v3(ready.stream)
    assert "activation memory needed" in ready.last()


def test_addresses_that_are_not_aligned(ready: Setup) -> None:
    context = ready.context()
    assert not context.set_tensor_address("images", ready.addresses["images"] + 128)
    assert "not aligned" in ready.last()
    need = context.update_device_memory_size_for_shapes()
    context.set_device_memory(ready.malloc(need + 64) + 64, need)
    assert "not aligned" in ready.last()


@pytest.mark.parametrize("name", list(BYTES))
def test_memory_that_is_too_small(name: str, ready: Setup) -> None:
    context = ready.context()
    context.set_tensor_address(name, ready.malloc(BYTES[name] - 1))
    with pytest.raises(StandinError, match=f"{name}: .* end 1 bytes past"):
        context.execute_async_v3(ready.stream)


@pytest.mark.parametrize("name", list(BYTES))
def test_memory_that_was_freed(name: str, ready: Setup) -> None:
    context = ready.context()
    ready.cuda.cudaFree(ready.addresses[name])
    with pytest.raises(StandinError, match=f"{name}: .* was freed"):
        context.execute_async_v3(ready.stream)


def test_memory_that_is_freed_under_a_run(ready: Setup) -> None:
    context = ready.context()
    context.execute_async_v3(ready.stream)
    with pytest.raises(StandinError, match="vae_decoder still uses it"):
        ready.cuda.cudaFree(ready.addresses["images"])


@pytest.mark.parametrize(
    ("name", "onto"), [("images", "latents"), ("finite", "latents"), ("finite", "images")]
)
def test_memory_that_overlaps(name: str, onto: str, ready: Setup) -> None:
    context = ready.context()
    both = ready.malloc(BYTES[name] + BYTES[onto])
    context.set_tensor_address(onto, both)
    context.set_tensor_address(name, both + 256)
    with pytest.raises(StandinError, match=f"({onto} and {name}|{name} and {onto}) overlap"):
        context.execute_async_v3(ready.stream)


def test_activation_memory_that_overlaps(ready: Setup) -> None:
    context = ready.context()
    need = context.update_device_memory_size_for_shapes()
    memory = ready.malloc(need + 256)
    context.set_tensor_address("finite", memory)
    context.set_device_memory(memory, need)
    with pytest.raises(StandinError, match="finite and activation memory overlap"):
        context.execute_async_v3(ready.stream)


def test_memory_that_the_context_has_itself(ready: Setup) -> None:
    strategy = ExecutionContextAllocationStrategy.STATIC
    context = ready.engine().create_execution_context(strategy)
    assert context is not None
    context.set_device_memory(ready.malloc(256), 256)
    assert "allocates its own" in ready.last()


# --- captures -------------------------------------------------------------------------------------

LOCAL = FakeCuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal


def test_new_shapes_are_not_captured(ready: Setup) -> None:
    context = ready.context()
    ready.cuda.cudaStreamBeginCapture(ready.stream, LOCAL)
    assert not context.execute_async_v3(ready.stream)
    assert "cannot be captured" in ready.last()
    ready.cuda.cudaStreamEndCapture(ready.stream)
    assert context.execute_async_v3(ready.stream)
    ready.cuda.cudaStreamBeginCapture(ready.stream, LOCAL)
    assert context.execute_async_v3(ready.stream)
    context.set_input_shape("latents", (1, 4, 16, 16))
    assert not context.execute_async_v3(ready.stream)


# --- TensorRT-RTX ---------------------------------------------------------------------------------


def rtx_context(made: Setup, strategy: str = "DISABLED") -> tuple[ExecutionContext, RuntimeConfig]:
    engine = made.engine()
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(MANAGED)
    config.cuda_graph_strategy = made.trt.CudaGraphStrategy[strategy]
    assert config.set_runtime_cache(config.create_runtime_cache())

    class Configured(CudaEngine):
        def create_execution_context(self, argument: Any, /) -> ExecutionContext | None:
            return super().create_execution_context(config)

    engine.__class__ = Configured
    return made.context(engine), config


def test_a_run_that_captures_itself_is_not_captured(setup: Callable[..., Setup]) -> None:
    made = setup("tensorrt-rtx")
    context, _ = rtx_context(made, "WHOLE_GRAPH_CAPTURE")
    assert context.execute_async_v3(made.stream)
    made.cuda.cudaStreamBeginCapture(made.stream, LOCAL)
    assert not context.execute_async_v3(made.stream)
    assert "so would be the run" in made.last()


def test_what_is_compiled_is_kept(setup: Callable[..., Setup]) -> None:
    made = setup("tensorrt-rtx")
    context, config = rtx_context(made)
    context.execute_async_v3(made.stream)
    context.execute_async_v3(made.stream)
    assert made.trt.compiled == ["vae_decoder"]
    assert config.cache is not None
    blob = bytes(config.cache.serialize())
    other = config.create_runtime_cache()
    assert other.deserialize(blob)
    assert other.compiled == config.cache.compiled
    assert not other.deserialize(b"damaged")
    made.cuda.device_name = "another device"
    assert not other.deserialize(blob)


def test_what_only_one_flavour_has(setup: Callable[..., Setup], ready: Setup) -> None:
    rtx = setup("tensorrt-rtx")
    config = rtx.engine().create_runtime_config()
    with pytest.raises(AttributeError):
        ready.engine().create_runtime_config()
    for argument in (config, None):
        with pytest.raises(TypeError):
            ready.engine().create_execution_context(argument)
    for name in ("Refitter", "OnnxParserRefitter"):
        assert hasattr(ready.trt, name)
        assert not hasattr(rtx.trt, name)
    for name in ("CudaGraphStrategy", "ComputeCapability"):
        assert hasattr(rtx.trt, name)
        assert not hasattr(ready.trt, name)


def test_types_that_numpy_has_not(ready: Setup) -> None:
    assert ready.trt.nptype(ready.trt.DataType.UINT8) is np.uint8
    with pytest.raises(TypeError):
        ready.trt.nptype(ready.trt.DataType.BF16)


# --- installing -----------------------------------------------------------------------------------


def test_install_puts_everything_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = standin.install(monkeypatch, versions={"tensorrt": "10.9.0"}, name="Orin")
    assert sys.modules["cuda.bindings.runtime"] is cuda
    assert cuda.device_name == "Orin"
    module = sys.modules["tensorrt"]
    assert isinstance(module, TensorRTModule)
    assert module.__dict__["__version__"] == "10.9.0"
    assert sys.modules["tensorrt_rtx"] is None
