"""The TensorRT engine on a stand-in: ONNX Runtime's results to the last bit, and refusals."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import standin
from oracles.prepared import prepared_engine
from sld_edge.engines.base import Array
from sld_edge.engines.cuda.device import Arena, Device, DeviceTensor
from sld_edge.engines.errors import EngineError, MissingPackageError
from sld_edge.engines.tensorrt.engine import TrtEngine, tensorrt_module
from sld_edge.engines.tensorrt.plan_info import FLAVOURS, Flavour
from sld_edge.runtime.bundle import EMBEDDED, Bundle
from sld_edge.runtime.plans import source_digest
from standin.cuda import FakeCuda, StandinError
from standin.plans import VERSIONS, make_plans
from standin.tensorrt import TensorRTModule

COMPONENTS = ("text_encoder", "unet", "guidance", "vae_decoder")
BOTH = pytest.mark.parametrize("flavour", FLAVOURS)
Open = Callable[..., TrtEngine]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return standin.install(monkeypatch)


@pytest.fixture
def device(cuda: FakeCuda) -> Iterator[Device]:
    device = Device()
    yield device
    device.close()
    assert not cuda.live_allocations()
    assert not cuda.live_handles()


@pytest.fixture
def opened(device: Device, tmp_path: Path) -> Iterator[Open]:
    """Make a plan and open it; every engine is closed in the end."""
    engines: list[TrtEngine] = []

    def make(
        component: str = "unet",
        flavour: Flavour = "tensorrt",
        *,
        cuda_graph: bool = True,
        source: Path | None = None,
        **settings: Any,
    ) -> TrtEngine:
        bundle = tmp_path / f"bundle{len(engines)}"
        shutil.copytree(EMBEDDED, bundle)
        plan = make_plans(bundle, engine=flavour, components=[component], **settings)[component]
        engine = TrtEngine(plan.path, plan.info, device, cuda_graph=cuda_graph, source=source)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


def feeds(component: str, *, images: int = 2, seed: int = 0, side: int = 16) -> dict[str, Array]:
    """Inputs of a component of the miniature bundle."""
    sizes = {"B": images, "K*B": 3 * images, "n": 1, "N": images, "L": 24}
    sizes |= {"h": side, "w": side, "H": 4 * side, "W": 4 * side}
    random = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    for spec in Bundle.open().manifest.components[component].inputs:
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)
        if spec.dtype == "float32":
            made[spec.name] = random.standard_normal(shape, np.float32)
        else:
            made[spec.name] = random.integers(0, 200, shape).astype(spec.dtype)
    return made


def wanted(component: str, given: dict[str, Array]) -> dict[str, Array]:
    """What the CPU pipeline's engine makes of it."""
    part = Bundle.open().manifest.components[component]
    with prepared_engine(source_digest(part), lambda: EMBEDDED / part.files[0].path) as engine:
        return engine.run(given)


def assert_same(got: dict[str, Array], expected: dict[str, Array]) -> None:
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array, err_msg=name)


def laid_out(engine: TrtEngine, given: dict[str, Array], **changes: Any) -> Arena:
    """Memory for a run, its inputs uploaded; `changes` replace dtype and shape."""
    results = wanted(engine.info.component, given)
    layout = {name: (a.dtype.name, a.shape) for name, a in (given | results).items()}
    arena = Arena(engine.device, layout | changes)
    for name, array in given.items():
        if name not in changes:
            engine.device.upload(arena[name], array)
    return arena


def tensors(engine: TrtEngine, arena: Arena) -> dict[str, DeviceTensor]:
    return {spec.name: arena[spec.name] for spec in (*engine.inputs, *engine.outputs)}


# --- what it computes -----------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("component", COMPONENTS)
def test_run_gives_what_onnx_runtime_gives(
    component: str, flavour: Flavour, cuda: FakeCuda, opened: Open
) -> None:
    engine = opened(component, flavour)
    for seed in (1, 2):
        given = feeds(component, seed=seed)
        assert_same(engine.run(given), wanted(component, given))
        if seed == 1:
            allocations = cuda.counts["cudaMalloc"]
    assert cuda.counts["cudaMalloc"] == allocations  # the second run finds everything laid out


@BOTH
@pytest.mark.parametrize("component", COMPONENTS)
def test_bind_gives_what_onnx_runtime_gives(
    component: str, flavour: Flavour, device: Device, cuda: FakeCuda, opened: Open
) -> None:
    engine = opened(component, flavour)
    given = feeds(component, images=1)
    arena = laid_out(engine, given)
    bound = engine.bind(tensors(engine, arena))
    cuda.log.clear()
    bound.enqueue()
    assert cuda.pending(device.stream)[-1] == component  # queued, not waited for
    assert not cuda.log  # and no call of CUDA's was needed
    expected = wanted(component, given)
    assert_same({name: device.download(arena[name]) for name in expected}, expected)
    arena.close()


@pytest.mark.parametrize("component", COMPONENTS)
def test_it_says_of_itself_what_the_bundle_says(component: str, opened: Open) -> None:
    engine, part = opened(component), Bundle.open().manifest.components[component]
    assert (engine.inputs, engine.outputs) == (part.inputs, part.outputs)


def test_buffers_are_kept_for_a_few_shapes_only(cuda: FakeCuda, opened: Open) -> None:
    engine = opened("vae_decoder", size=(64, 64, 128), batch=(1, 1, 4))
    for images, side in ((1, 16), (2, 16), (3, 16), (4, 16), (1, 32), (1, 16)):
        given = feeds("vae_decoder", images=images, side=side)
        assert_same(engine.run(given), wanted("vae_decoder", given))
        assert len(cuda.live_allocations()) <= 5  # four sets of buffers and the workspace


def test_plans_take_turns_in_one_workspace(device: Device, opened: Open) -> None:
    """Also where it has grown, and lies elsewhere, since a plan was bound."""
    small, large = opened("guidance"), opened("vae_decoder", size=(64, 64, 256))
    given = feeds("guidance", images=1)
    first = small.run(given)
    generation = device.workspace.generation
    large.run(feeds("vae_decoder", images=4, side=64))
    assert device.workspace.generation > generation
    assert_same(small.run(given), first)


def test_a_plan_that_was_bound_runs_again_after_memory_ran_out(
    device: Device, opened: Open
) -> None:
    """The workspace is freed before it grows, so a plan must not use the address it had."""
    plan, given = opened("guidance"), feeds("guidance", images=1)
    first = plan.run(given)
    with pytest.raises(EngineError, match="out of memory"):
        device.workspace.require(1 << 40)
    for _ in range(2):
        assert_same(plan.run(given), first)


# --- graphs ---------------------------------------------------------------------------------------


def test_a_run_can_be_captured_once_shapes_have_settled(
    device: Device, cuda: FakeCuda, opened: Open
) -> None:
    engine = opened("unet")
    given = feeds("unet")
    arena = laid_out(engine, given)
    bound = engine.bind(tensors(engine, arena))
    with pytest.raises(EngineError, match=r"did not run it \| got .*cannot be captured"):
        device.capture(bound.enqueue).close()
    bound.enqueue()
    graph = device.capture(bound.enqueue)
    device.clear(arena["noise_pred"])
    graph.launch()
    np.testing.assert_array_equal(
        device.download(arena["noise_pred"]), wanted("unet", given)["noise_pred"]
    )
    graph.close()
    arena.close()


@pytest.mark.parametrize(
    ("flavour", "cuda_graph", "capturable"),
    [
        ("tensorrt", True, True),
        ("tensorrt", False, False),
        ("tensorrt-rtx", True, False),  # it captures by itself
        ("tensorrt-rtx", False, False),
    ],
)
def test_who_captures(flavour: Flavour, cuda_graph: bool, capturable: bool, opened: Open) -> None:
    engine = opened("guidance", flavour, cuda_graph=cuda_graph)
    assert engine.capturable is capturable
    if engine._jit is not None:
        strategies = sys.modules["tensorrt_rtx"].CudaGraphStrategy
        strategy = strategies.WHOLE_GRAPH_CAPTURE if cuda_graph else strategies.DISABLED
        assert engine._jit.config.cuda_graph_strategy == strategy


# --- what it refuses ------------------------------------------------------------------------------


def assert_one_line(error: pytest.ExceptionInfo[EngineError], *says: str) -> None:
    assert "\n" not in str(error.value)
    for words in says:
        assert words in str(error.value)


def test_a_shape_outside_the_profile(cuda: FakeCuda, opened: Open) -> None:
    engine = opened("unet", batch=(1, 1, 4))
    before = cuda.live_allocations()
    with pytest.raises(EngineError) as caught:
        engine.run(feeds("unet", images=5))
    assert_one_line(
        caught,
        "unet.plan: shape of latents",
        "got [5, 4, 16, 16]",
        "expected [1, 4, 16, 16] to [4, 4, 16, 16]",
        "--batch",
    )
    assert cuda.live_allocations() == before


def test_a_bound_shape_outside_the_profile(opened: Open) -> None:
    engine = opened("vae_decoder", size=(64, 64, 96))
    arena = laid_out(engine, feeds("vae_decoder", side=32))
    with pytest.raises(EngineError) as caught:
        engine.bind(tensors(engine, arena))
    assert_one_line(caught, "shape of latents", "got [2, 4, 32, 32]", "to [4, 4, 24, 24]")
    arena.close()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"timestep": np.zeros(2, np.int64)}, "input timestep | got int64 [2] | expected float32"),
        ({"timestep": np.zeros((2, 1), np.float32)}, "input timestep | got float32 [2, 1]"),
        ({"context": np.zeros((6, 24, 97), np.float32)}, "input context | got float32 [6, 24, 97]"),
        ({"noise": np.zeros(2, np.float32)}, "no such input | got noise"),
    ],
)
def test_feeds_of_another_kind(change: dict[str, Array], says: str, opened: Open) -> None:
    with pytest.raises(EngineError) as caught:
        opened("unet").run(feeds("unet") | change)
    assert_one_line(caught, f"unet.plan: {says}")


def test_a_missing_feed(opened: Open) -> None:
    given = feeds("unet")
    del given["context"]
    with pytest.raises(EngineError, match=r"unet.plan: input context \| got nothing"):
        opened("unet").run(given)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"timestep": ("float16", (2,))}, "tensor timestep | got float16 [2] | expected float32"),
        ({"noise_pred": ("float32", (6, 4, 16, 15))}, "tensor noise_pred | got float32 [6, 4, 16"),
        ({"noise_pred": ("float32", (3, 4, 16, 16))}, "expected float32 [6, 4, 16, 16]"),
        ({"context": ("float32", (6, 23, 96))}, "shape of context | got [6, 23, 96]"),
    ],
)
def test_bound_tensors_of_another_kind(change: dict[str, Any], says: str, opened: Open) -> None:
    engine = opened("unet")
    arena = laid_out(engine, feeds("unet"), **change)
    with pytest.raises(EngineError) as caught:
        engine.bind(tensors(engine, arena))
    assert_one_line(caught, says)
    arena.close()


def test_bound_tensors_that_are_missing_unknown_or_not_aligned(opened: Open) -> None:
    engine = opened("unet")
    arena = laid_out(engine, feeds("unet"))
    given = tensors(engine, arena)
    missing = {name: tensor for name, tensor in given.items() if name != "context"}
    no_output = {name: tensor for name, tensor in given.items() if name != "noise_pred"}
    moved = replace(given["timestep"], address=given["timestep"].address + 4)
    for wrong, says in (
        (missing, "unet.plan: no shape for context"),
        (no_output, "unet.plan: tensor noise_pred | got nothing"),
        (given | {"noise": given["latents"]}, "unet.plan: no such tensor | got noise"),
        (given | {"timestep": moved}, "timestep is not aligned to 256 bytes"),
    ):
        with pytest.raises(EngineError) as caught:
            engine.bind(wrong)
        assert_one_line(caught, says)
    arena.close()


def test_memory_that_was_freed_under_a_bound_plan(opened: Open) -> None:
    engine = opened("unet")
    arena = laid_out(engine, feeds("unet"))
    bound = engine.bind(tensors(engine, arena))
    arena.close()
    with pytest.raises(StandinError, match="was freed"):
        bound.enqueue()


def test_a_closed_engine_holds_nothing_and_runs_nothing(
    device: Device, cuda: FakeCuda, opened: Open
) -> None:
    given = feeds("guidance")
    with opened("guidance") as engine:
        engine.run(given)
    assert list(cuda.live_allocations()) == [device.workspace.address]
    with pytest.raises(EngineError, match="was closed"):
        engine.run(given)


@pytest.mark.parametrize("images", [3, 4], ids=["no workspace", "no buffers"])
def test_out_of_device_memory(images: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cuda = standin.install(monkeypatch, total_memory=50_000)
    bundle = Path(shutil.copytree(EMBEDDED, tmp_path / "bundle"))
    plan = make_plans(bundle, engine="tensorrt", components=["vae_decoder"])["vae_decoder"]
    with TrtEngine(plan.path, plan.info, Device()) as engine:
        with pytest.raises(EngineError) as caught:
            engine.run(feeds("vae_decoder", images=images))
        assert_one_line(caught, "CUDA: cudaMalloc failed", "out of memory", "--low-memory")
        assert not cuda.live_allocations()
        given = feeds("vae_decoder", images=1)
        assert_same(engine.run(given), wanted("vae_decoder", given))


# --- plans ----------------------------------------------------------------------------------------


@BOTH
def test_a_plan_that_tensorrt_does_not_take(flavour: Flavour, opened: Open) -> None:
    """Its description may be right and the plan not."""
    with pytest.raises(EngineError) as caught:
        opened("guidance", flavour, version="1.2.3")
    assert_one_line(
        caught,
        f"{flavour} {VERSIONS[flavour]} does not take",
        "version tag 1.2.3 does not match",
        "sld-build",
    )


def test_a_tensorrt_that_is_there_and_broken(
    cuda: FakeCuda, device: Device, tmp_path: Path
) -> None:
    """The lean library of 11.4 without a usable driver logs an error and returns an object."""
    bundle = Path(shutil.copytree(EMBEDDED, tmp_path / "bundle"))
    plan = make_plans(bundle, engine="tensorrt", components=["guidance"])["guidance"]
    sys.modules["tensorrt"].shared.broken = True
    with pytest.raises(EngineError) as caught:
        TrtEngine(plan.path, plan.info, device)
    assert_one_line(caught, "tensorrt 10.3.0 does not start", "error: 35", "NVIDIA driver")


def test_a_plan_that_is_none(device: Device, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(EMBEDDED, tmp_path / "bundle"))
    plan = make_plans(bundle, engine="tensorrt", components=["unet"])["unet"]
    plan.path.write_bytes(b"something else")
    with pytest.raises(EngineError, match="does not take .* got .*not a plan"):
        TrtEngine(plan.path, plan.info, device)


def test_a_version_compatible_plan_may_bring_its_own_code(opened: Open) -> None:
    given = feeds("guidance")
    engine = opened("guidance", version="10.1.0", options={"version_compatible": True})
    assert_same(engine.run(given), wanted("guidance", given))


def test_a_stripped_plan_takes_its_weights_from_the_graph(opened: Open) -> None:
    given = feeds("unet")
    engine = opened("unet", options={"strip_weights": True}, source=EMBEDDED / "unet.onnx")
    assert_same(engine.run(given), wanted("unet", given))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (None, ("holds no weights and its ONNX graph is not here", "--strip-weights")),
        ("guidance.onnx", ("the weights of guidance.onnx do not fit", "nothing for unet.weight")),
        ("no.onnx", ("the weights of no.onnx do not fit", "sld-build")),
    ],
)
def test_a_stripped_plan_without_its_weights(
    source: str | None, says: tuple[str, ...], opened: Open
) -> None:
    path = EMBEDDED / source if source is not None else None
    with pytest.raises(EngineError) as caught:
        opened("unet", options={"strip_weights": True}, source=path)
    assert_one_line(caught, *says)


# --- what TensorRT-RTX compiled -------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("SLD_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jit"


@pytest.fixture
def process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path
) -> Callable[..., list[str]]:
    """Run guidance as a new process would, and say what had to be compiled."""
    bundle = Path(shutil.copytree(EMBEDDED, tmp_path / "bundle"))
    plan = make_plans(bundle, engine="tensorrt-rtx", components=["guidance"])["guidance"]

    def run(**settings: Any) -> list[str]:
        standin.install(monkeypatch, **settings)
        device = Device()
        with TrtEngine(plan.path, plan.info, device) as engine:
            engine.run(feeds("guidance"))
        device.close()
        module = sys.modules["tensorrt_rtx"]
        assert isinstance(module, TensorRTModule)
        return module.compiled

    return run


def test_what_was_compiled_survives(process: Callable[..., list[str]], cache: Path) -> None:
    assert process() == ["guidance"]
    (file,) = cache.iterdir()
    written = file.stat().st_mtime_ns
    assert process() == []
    assert file.stat().st_mtime_ns == written  # nothing new, nothing written
    assert process(driver=13010) == ["guidance"]
    assert process(name="another device") == ["guidance"]
    assert process() == []  # each has a file of its own
    assert len(list(cache.iterdir())) == 3


def test_what_was_compiled_survives_a_kill(opened: Open, cache: Path) -> None:
    """It is stored after the first run, not when the engine is closed."""
    engine = opened("guidance", "tensorrt-rtx")
    assert not list(cache.iterdir())
    engine.run(feeds("guidance"))
    (file,) = cache.iterdir()
    written = file.stat().st_mtime_ns
    engine.run(feeds("guidance"))
    assert file.stat().st_mtime_ns == written


def test_every_image_comes_from_the_same_kernels(opened: Open) -> None:
    """Also the first one: TensorRT-RTX compiles before it runs, not meanwhile."""
    engine, given = opened("guidance", "tensorrt-rtx"), feeds("guidance")
    first = engine.run(given)
    assert_same(engine.run(given), first)


def test_a_damaged_cache_is_compiled_anew(process: Callable[..., list[str]], cache: Path) -> None:
    process()
    (file,) = cache.iterdir()
    file.write_bytes(b"\0 not a cache")
    assert process() == ["guidance"]
    assert process() == []


def test_without_a_cache(
    process: Callable[..., list[str]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLD_EDGE_CACHE", "off")
    assert process() == ["guidance"]
    assert process() == ["guidance"]
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_costs_only_time(
    process: Callable[..., list[str]], cache: Path
) -> None:
    cache.parent.mkdir()
    cache.write_text("a file where the folder belongs")
    assert process() == ["guidance"]


# --- the package ----------------------------------------------------------------------------------


@BOTH
def test_tensorrt_that_is_not_installed(flavour: Flavour, monkeypatch: pytest.MonkeyPatch) -> None:
    standin.install(monkeypatch, versions={})
    with pytest.raises((MissingPackageError, EngineError), match=flavour.replace("-", "_")):
        tensorrt_module(flavour)


def test_shapes_that_clash_are_one_line(opened: Open) -> None:
    given = feeds("unet")
    given["timestep"] = np.zeros(3, np.float32)  # for two images
    with pytest.raises(EngineError) as error:
        opened("unet").run(given)
    assert_one_line(error, "shapes do not fit together", "timestep [3]")
