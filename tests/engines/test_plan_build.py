"""Settings of a build, what is refused, and what TensorRT is told; real where it needs no GPU."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import onnx
import pytest
import tensorrt_rtx
from onnx import TensorProto, helper

from oracles.fake_builder import FakeDevice, FakeTensorRT
from oracles.models import config_of, tiny_unet, weights_of
from sld_edge.engines.base import TensorSpec
from sld_edge.engines.errors import EngineError, InputError, MissingPackageError
from sld_edge.engines.tensorrt import builder_api as trt_builder_api
from sld_edge.engines.tensorrt import target as plan_target
from sld_edge.engines.tensorrt.build import build_plan, timing_cache_path
from sld_edge.engines.tensorrt.build_log import PlanContents
from sld_edge.engines.tensorrt.build_settings import (
    BATCH,
    BuildSettings,
    dimensions,
    profile,
    span_from_numbers,
)
from sld_edge.engines.tensorrt.plan_info import (
    Flavour,
    PlanInfo,
    PlanTensor,
    Span,
    info_path,
    plan_info_from_file,
)
from sld_edge.engines.tensorrt.target import Target, build_target, supported_capabilities
from sld_edge.export.graphs.builder import GraphOptions
from sld_edge.export.graphs.unet import write_unet
from sld_edge.export.verify import graph_facts

RTX: Flavour = "tensorrt-rtx"
TAKEN = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")  # by tensorrt_rtx 1.7.1
SIZES = {
    "N": Span(min=1, opt=2, max=4),
    "B": Span(min=1, opt=1, max=2),
    "K*B": Span(min=1, opt=3, max=6),
    "L": Span(min=77, opt=77, max=77),
    "h": Span(min=32, opt=32, max=64),
    "w": Span(min=32, opt=32, max=64),
}


def draft_of(
    graph: Path, target: Target, *, sizes: Mapping[str, Span] = SIZES, **changes: Any
) -> PlanInfo:
    facts = graph_facts(graph)
    inputs = tuple(PlanTensor(spec=spec, profile=profile(spec, sizes)) for spec in facts.inputs)
    info = PlanInfo(
        component=graph.stem,
        sha256="",
        bytes=0,
        source_sha256="0" * 64,
        engine=target.engine,
        engine_version=target.version,
        system="linux x86_64",
        devices=target.devices,
        compute_capabilities=target.compute_capabilities,
        precision="fp16",
        inputs=inputs,
        outputs=tuple(PlanTensor(spec=spec) for spec in facts.outputs),
        options={},
        seconds=0.0,
        created_by="test",
    )
    return replace(info, **changes)


def small_graph(path: Path, op: str = "Relu", opset: int = 20, **attributes: Any) -> Path:
    """Write `y = op(x)` for x [N,8] float32."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 8]) for n in "xy")
    node = helper.make_node(op, ["x"], ["y"], name="first", **attributes)
    opsets = [helper.make_opsetid("", opset)]
    graph = helper.make_graph([node], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    onnx.save(model, str(path))
    return path


class Build(Protocol):
    def __call__(self, settings: BuildSettings, **changes: Any) -> PlanInfo: ...


@pytest.fixture
def classic(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeTensorRT:
    """TensorRT 10.3 on an Orin, with a timing cache of its own."""
    fake = FakeTensorRT()
    monkeypatch.setenv("SLD_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(plan_target, "tensorrt_module", lambda flavour: fake)
    monkeypatch.setattr(plan_target, "Device", FakeDevice)
    return fake


@pytest.fixture
def built(tmp_path: Path) -> Build:
    """Build a small graph with the stand-in or the real TensorRT-RTX."""
    graph = small_graph(tmp_path / "small.onnx")

    def build(settings: BuildSettings, **changes: Any) -> PlanInfo:
        target = build_target(settings)
        return build_plan(
            draft_of(graph, target, **changes),
            nullcontext(graph),
            tmp_path / "small.plan",
            settings=settings,
            target=target,
        )

    return build


def told(tmp_path: Path) -> dict[str, Any]:
    """What the stand-in was told."""
    return dict(json.loads((tmp_path / "small.plan").read_text()))


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "option", "reason"),
    [
        (RTX, {"version_compatible": True}, "no --version-compatible | build with the version"),
        (RTX, {"hardware_compatible": True}, "no --hardware-compatible | name every kind"),
        (RTX, {"strip_weights": True}, "no --strip-weights | TensorRT-RTX needs a GPU"),
        (RTX, {"workspace": 2**30}, "no --workspace | TensorRT-RTX picks kernels"),
        ("tensorrt", {"compute_capabilities": ("8.6",)}, "no --compute-capability | TensorRT"),
        (RTX, {"optimization_level": 6}, "optimization level | got 6 | expected 0 to 5"),
        ("tensorrt", {"workspace": 0}, "workspace | got 0"),
        ("tensorflow", {}, "engine | got 'tensorflow' | expected tensorrt-rtx or tensorrt"),
    ],
)
def test_an_option_that_an_engine_lacks_is_refused(
    engine: Any, option: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError) as caught:
        BuildSettings(engine=engine, **option)
    assert reason in str(caught.value)


def test_one_number_or_three_make_a_span() -> None:
    assert span_from_numbers((512,), what="--size") == Span(min=512, opt=512, max=512)
    assert span_from_numbers((1, 2, 4), what="--batch") == Span(min=1, opt=2, max=4)


@pytest.mark.parametrize("numbers", [(), (1, 2), (2, 1, 4), (1, 4, 2), (0,), (1, 2, 3, 4)])
def test_other_numbers_are_refused(numbers: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="--batch | got .* | expected one number, or MIN OPT MAX"):
        span_from_numbers(numbers, what="--batch")


def test_sizes_follow_from_batch_pixels_and_text() -> None:
    settings = BuildSettings(
        engine=RTX, batch=Span(min=1, opt=2, max=4), size=Span(min=256, opt=512, max=768)
    )
    sizes = dimensions(settings, width=512, height=512, downscale=8, text_length=77, concepts=1)
    assert sizes["B"] == Span(min=1, opt=2, max=4)
    assert sizes["K*B"] == Span(min=1, opt=6, max=12)  # one to three branches an image
    assert sizes["n"] == Span(min=1, opt=1, max=1)
    assert sizes["N"] == Span(min=1, opt=1, max=1)
    assert sizes["L"] == Span(min=77, opt=77, max=77)
    assert sizes["h"] == sizes["w"] == Span(min=32, opt=64, max=96)
    assert sizes["H"] == sizes["W"] == Span(min=256, opt=512, max=768)
    spec = TensorSpec(name="context", dtype="float32", shape=("K*B", "L", 768))
    assert profile(spec, sizes) == ((1, 77, 768), (6, 77, 768), (12, 77, 768))


def test_each_concept_is_a_branch() -> None:
    given = {"width": 512, "height": 512, "downscale": 8, "text_length": 77}
    batch = Span(min=1, opt=2, max=4)
    own = dimensions(BuildSettings(engine=RTX, batch=batch), concepts=2, **given)
    assert own["K*B"] == Span(min=1, opt=8, max=16)
    assert own["n"] == Span(min=1, opt=2, max=2)
    more = dimensions(BuildSettings(engine=RTX, batch=batch, concepts=3), concepts=1, **given)
    assert more["K*B"] == Span(min=1, opt=6, max=20)
    assert more["n"] == Span(min=1, opt=1, max=3)
    with pytest.raises(InputError, match="concepts | got 0"):
        BuildSettings(engine=RTX, concepts=0)


def test_without_a_size_the_bundles_own_is_fixed() -> None:
    sizes = dimensions(
        BuildSettings(engine=RTX), width=768, height=512, downscale=8, text_length=77, concepts=1
    )
    assert (sizes["W"].min, sizes["W"].max, sizes["h"].min, sizes["h"].max) == (768, 768, 64, 64)
    assert sizes["B"] == BATCH


def test_sizes_that_leave_the_branches_unaligned_are_refused() -> None:
    settings = BuildSettings(engine=RTX, size=Span(min=256, opt=512, max=520))
    with pytest.raises(InputError, match="got 520 pixels | expected a multiple of 32"):
        dimensions(settings, width=512, height=512, downscale=8, text_length=77, concepts=1)
    with pytest.raises(InputError, match="multiple of 32"):
        dimensions(
            BuildSettings(engine=RTX),
            width=520,
            height=512,
            downscale=8,
            text_length=77,
            concepts=1,
        )


def test_an_unknown_dimension_is_refused() -> None:
    with pytest.raises(InputError, match="input x: dimension 'Q'"):
        profile(TensorSpec(name="x", dtype="float32", shape=("Q",)), SIZES)


# --- the names we use are there -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "name"),
    [
        ("NetworkTensor", "ITensor"),
        ("NetworkDefinition", "INetworkDefinition"),
        ("ParserError", "ParserError"),
        ("OnnxParser", "OnnxParser"),
        ("OptimizationProfile", "IOptimizationProfile"),
        ("TimingCache", "ITimingCache"),
        ("BuilderConfig", "IBuilderConfig"),
        ("Builder", "Builder"),
        ("TensorRTBuilder", None),
    ],
)
def test_every_name_of_the_page_exists_in_the_installed_tensorrt(
    page: str, name: str | None
) -> None:
    protocol = getattr(trt_builder_api, page)
    names = {n for n in protocol.__dict__ if not n.startswith("_")} | set(protocol.__annotations__)
    assert names
    real = tensorrt_rtx if name is None else getattr(tensorrt_rtx, name)
    assert not {each for each in names if not hasattr(real, each)}


@pytest.mark.parametrize(
    "name",
    [
        "BuilderFlag.TF32",
        "BuilderFlag.VERSION_COMPATIBLE",
        "BuilderFlag.STRIP_PLAN",
        "BuilderFlag.REFIT_IDENTICAL",
        "MemoryPoolType.WORKSPACE",
        "HardwareCompatibilityLevel.AMPERE_PLUS",
        "NetworkDefinitionCreationFlag.STRONGLY_TYPED",
    ],
)
def test_every_member_we_use_exists(name: str) -> None:
    kind, member = name.split(".")
    assert hasattr(getattr(tensorrt_rtx, kind), member)


# --- TensorRT-RTX, for real -----------------------------------------------------------------------


def test_capabilities_are_read_from_the_installed_version() -> None:
    assert supported_capabilities(tensorrt_rtx) == TAKEN


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("8.7", "a Jetson builds its plans itself, with --engine tensorrt"),
        ("9.0", "a device of another kind builds its plans itself, with --engine tensorrt"),
        ("86", "12.1"),
        ("sm_86", "12.1"),
    ],
)
def test_other_capabilities_are_refused_by_name(name: str, advice: str) -> None:
    with pytest.raises(InputError) as caught:
        build_target(BuildSettings(engine=RTX, compute_capabilities=("8.6", name)))
    text = str(caught.value)
    listed = "7.5, 8.0, 8.6, 8.9, 12.0, 12.1"
    assert text.startswith(f"compute capability {name} | expected one of {listed}")
    assert text.endswith(advice)


def test_capabilities_are_put_in_order_once() -> None:
    settings = BuildSettings(engine=RTX, compute_capabilities=("12.0", "8.6", "12.0"))
    target = build_target(settings)
    assert target.compute_capabilities == ("8.6", "12.0")
    assert target.devices == ()


def test_without_a_device_all_capabilities_are_taken() -> None:
    assert build_target(BuildSettings(engine=RTX)).compute_capabilities == TAKEN
    target = build_target(BuildSettings(engine=RTX), fp32=True)
    assert target.compute_capabilities == TAKEN[1:]
    assert "leaves 7.5 out" in target.why


def test_with_a_device_its_own_capability_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_target, "Device", lambda: FakeDevice("RTX 4060", "8.9"))
    assert build_target(BuildSettings(engine=RTX)).compute_capabilities == ("8.9",)


def test_turing_and_fp32_do_not_go_together() -> None:
    settings = BuildSettings(engine=RTX, compute_capabilities=("7.5", "8.6"))
    assert build_target(settings).compute_capabilities == ("7.5", "8.6")
    with pytest.raises(InputError, match="compute capability 7.5 | got a graph in fp32"):
        build_target(settings, fp32=True)


def test_a_plan_and_its_description(built: Build, tmp_path: Path) -> None:
    settings = BuildSettings(engine=RTX, compute_capabilities=("8.6",), optimization_level=1)
    info = built(settings)
    path = tmp_path / "small.plan"
    assert plan_info_from_file(info_path(path)) == info
    assert info.bytes == path.stat().st_size > 1000
    assert info.seconds > 0
    (x,), (y,) = info.inputs, info.outputs
    assert x.spec == TensorSpec(name="x", dtype="float32", shape=("N", 8))
    assert x.profile == ((1, 8), (2, 8), (4, 8))
    assert y == PlanTensor(spec=TensorSpec(name="y", dtype="float32", shape=("N", 8)))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "small.onnx",
        "small.plan",
        "small.plan.json",
    ]


def test_a_graph_that_is_not_the_described_one_is_refused(built: Build) -> None:
    other = PlanTensor(spec=TensorSpec(name="y", dtype="float16", shape=("N", 8)))
    settings = BuildSettings(engine=RTX, compute_capabilities=("8.6",))
    with pytest.raises(EngineError) as caught:
        built(settings, outputs=(other,))
    assert "not as bundle.json describes it | got x float32 ['N', 8], y float32" in str(
        caught.value
    )
    assert "expected x float32 ['N', 8], y float16" in str(caught.value)


def test_what_the_parser_cannot_read_is_named(tmp_path: Path, capfd: Any) -> None:
    good = small_graph(tmp_path / "good.onnx")
    bad = small_graph(tmp_path / "bad.onnx", "StringSplitter")
    settings = BuildSettings(engine=RTX, compute_capabilities=("8.6",))
    target = build_target(settings)
    with pytest.raises(EngineError) as caught:
        build_plan(
            draft_of(good, target),
            nullcontext(bad),
            tmp_path / "bad.plan",
            settings=settings,
            target=target,
        )
    text = str(caught.value)
    assert "tensorrt-rtx 1.7.1.116 cannot read the graph, node 'first' (StringSplitter)" in text
    assert "--attention decomposed" in text
    assert "\n" not in text
    assert not (tmp_path / "bad.plan").exists()
    assert capfd.readouterr() == ("", "")


FORMS: tuple[Literal["op", "decomposed"], ...] = ("op", "decomposed")


@pytest.fixture(scope="module")
def real_width(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """UNets of two levels as wide as SD 1.5's, in FP16: 10 attentions with heads of 40 and 80."""
    folder = tmp_path_factory.mktemp("real")
    model = tiny_unet(
        "sd1",
        text_width=768,
        block_out_channels=(320, 640),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=32,
    )
    weights = weights_of(model, folder / "unet.safetensors")
    for form in FORMS:
        options = GraphOptions(precision="fp16", attention=form)
        write_unet(config_of(model), weights, options, folder / f"{form}.onnx")
    return {form: folder / f"{form}.onnx" for form in FORMS}


def built_of(graph: Path, folder: Path, sizes: Mapping[str, Span], *capabilities: str) -> PlanInfo:
    settings = BuildSettings(engine=RTX, compute_capabilities=capabilities)
    target = build_target(settings)
    stages: list[str] = []
    info = build_plan(
        draft_of(graph, target, sizes=sizes),
        nullcontext(graph),
        folder / "unet.plan",
        settings=settings,
        target=target,
        stage=stages.append,
    )
    assert stages == ["parsing", "building"]
    assert plan_info_from_file(info_path(folder / "unet.plan")) == info
    return info


def contents_of(info: PlanInfo) -> PlanContents:
    assert info.contents is not None
    return info.contents


def test_blocks_of_the_real_width_build_in_fp16(
    real_width: Mapping[str, Path], tmp_path: Path
) -> None:
    info = built_of(real_width["decomposed"], tmp_path, SIZES, "7.5", "8.6", "8.9", "12.0")
    assert info.compute_capabilities == ("7.5", "8.6", "8.9", "12.0")
    weights_in_fp16 = real_width["decomposed"].with_suffix(".onnx.data").stat().st_size
    assert 0.9 * weights_in_fp16 < info.bytes < 2 * weights_in_fp16
    context = next(t for t in info.inputs if t.spec.name == "context")
    assert context.profile == ((1, 77, 768), (3, 77, 768), (6, 77, 768))


ONE_SIZE = {
    **SIZES,
    "B": Span(min=1, opt=1, max=1),
    "K*B": Span(min=1, opt=3, max=3),
    "h": Span(min=32, opt=32, max=32),
    "w": Span(min=32, opt=32, max=32),
}


def test_every_attention_is_fused(real_width: Mapping[str, Path], tmp_path: Path) -> None:
    found = {}
    for form, graph in real_width.items():
        for name, sizes in (("one size", ONE_SIZE), ("any", SIZES)):
            found[form, name] = contents_of(built_of(graph, tmp_path, sizes, "8.6"))
    softmaxes = [
        node
        for node in onnx.load(str(real_width["decomposed"]), load_external_data=False).graph.node
        if node.op_type == "Softmax"
    ]
    for case, contents in found.items():
        assert contents.attentions == len(softmaxes) == 8, case
        assert contents.fused_attentions == contents.attentions, case
        # The boundary, and what layer and group normalization keep; everything else is FP16.
        assert contents.fp32_kernels < 0.1 * contents.kernels, case
    # The plan's largest shapes decide: 2 images of 64x64 cells against 1 of 32x32.
    for form in FORMS:
        ratio = found[form, "any"].activation_bytes / found[form, "one size"].activation_bytes
        assert 4 < ratio < 10
    # Why plans are built from the decomposed form: the operator's inputs are moved first.
    assert found["decomposed", "any"].kernels < 0.95 * found["op", "any"].kernels


def test_an_attention_that_falls_apart_is_seen(tmp_path: Path) -> None:
    model = tiny_unet("sd1")  # heads of 8
    graph = tmp_path / "unet.onnx"
    weights = weights_of(model, tmp_path / "unet.safetensors")
    options = GraphOptions(precision="fp32", attention="decomposed")
    write_unet(config_of(model), weights, options, graph)
    contents = contents_of(built_of(graph, tmp_path, SIZES, "8.6"))
    assert contents.fused_attentions == 0 < contents.attentions
    assert contents.fp32_kernels > 0.5 * contents.kernels


def test_an_interrupted_build_stops_and_leaves_nothing(tmp_path: Path) -> None:
    model = tiny_unet("sd1", text_width=64, block_out_channels=(64, 128), norm_num_groups=8)
    graph = tmp_path / "unet.onnx"
    weights = weights_of(model, tmp_path / "unet.safetensors")
    options = GraphOptions(precision="fp16", attention="decomposed")
    write_unet(config_of(model), weights, options, graph)
    settings = BuildSettings(engine=RTX, compute_capabilities=("8.6",))
    target = build_target(settings)

    def interrupt(stage: str) -> None:
        if stage == "building":
            kill = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
            kill.start()

    def build() -> None:
        build_plan(
            draft_of(graph, target),
            nullcontext(graph),
            tmp_path / "unet.plan",
            settings=settings,
            target=target,
            stage=interrupt,
        )
        time.sleep(1)  # a build that was faster than its interruption

    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        build()
    assert {path.name for path in tmp_path.iterdir()} == before


# --- classic TensorRT, on the stand-in ------------------------------------------------------------


def test_the_classic_one_builds_for_the_device_it_runs_on(
    classic: FakeTensorRT, built: Build, tmp_path: Path
) -> None:
    info = built(BuildSettings(engine="tensorrt"))
    assert info.devices == ("Orin",)
    assert info.compute_capabilities == ("8.7",)
    assert info.engine_version == "10.3.0"
    said = told(tmp_path)
    assert said["flags"] == ["STRICT_NANS"]  # not even TF32
    assert said["features"] == ["RUNTIME_ACTIVATION_RESIZE_10_10"]
    assert said["pools"] == {}
    assert said["level"] == 3
    assert said["profile"]["x"] == [[1, 8], [2, 8], [4, 8]]


def test_options_of_the_classic_one_reach_it(
    classic: FakeTensorRT, built: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        plan_target, "Device", lambda: FakeDevice("RTX A2000", "8.6", integrated=False)
    )
    built(
        BuildSettings(
            engine="tensorrt",
            workspace=512 * 2**20,
            optimization_level=0,
            version_compatible=True,
            hardware_compatible=True,
            strip_weights=True,
        )
    )
    said = told(tmp_path)
    flags = ["REFIT_IDENTICAL", "STRICT_NANS", "STRIP_PLAN", "VERSION_COMPATIBLE"]
    assert said["flags"] == flags
    assert said["pools"] == {"WORKSPACE": 512 * 2**20}
    assert said["level"] == 0
    assert said["hardware"] == "AMPERE_PLUS"


def test_a_jetson_has_no_hardware_compatibility(classic: FakeTensorRT) -> None:
    with pytest.raises(InputError, match="Orin has no --hardware-compatible"):
        build_target(BuildSettings(engine="tensorrt", hardware_compatible=True))


def test_timings_are_kept_for_a_version_and_device(
    classic: FakeTensorRT, built: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = BuildSettings(engine="tensorrt")
    built(settings)
    built(settings)
    assert classic.caches == [b"", b"10.3.0: measured"]
    path = timing_cache_path(build_target(settings))
    assert path is not None
    path.write_bytes(b"damaged")
    built(settings)
    assert classic.caches[2:] == [b""]

    monkeypatch.setattr(plan_target, "Device", lambda: FakeDevice("Orin NX"))
    built(settings)
    assert classic.caches[3:] == [b""]  # another device, measured anew


def test_without_a_cache_folder_timings_are_not_kept(
    classic: FakeTensorRT, built: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLD_EDGE_CACHE", "off")
    settings = BuildSettings(engine="tensorrt")
    assert timing_cache_path(build_target(settings)) is None
    built(settings)
    built(settings)
    assert classic.caches == [b"", b""]


def test_tensorrt_11_has_no_flag_for_strong_types(
    built: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SLD_EDGE_CACHE", "off")
    fake = FakeTensorRT("11.0.0", newest_opset=24)
    monkeypatch.setattr(plan_target, "tensorrt_module", lambda flavour: fake)
    monkeypatch.setattr(plan_target, "Device", FakeDevice)
    assert built(BuildSettings(engine="tensorrt")).engine_version == "11.0.0"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Error Code 2: OutOfMemory (Requested size was 912680550400 bytes.)", "add swap"),
        ("Error Code 1: Cuda Runtime (out of memory)", "close other programs"),
        ("Error Code 10: Could not find any implementation for node", "TensorRT did not build it"),
    ],
)
def test_why_a_build_failed_is_said(
    line: str, message: str, classic: FakeTensorRT, built: Build, tmp_path: Path
) -> None:
    classic.complaints = ["an older error", line]
    with pytest.raises(EngineError) as caught:
        built(BuildSettings(engine="tensorrt"))
    assert line in str(caught.value)
    assert message in str(caught.value)
    assert not (tmp_path / "small.plan").exists()


def test_running_out_of_memory_outside_tensorrt_is_said_too(
    classic: FakeTensorRT, built: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def burst(*_: object) -> None:
        raise MemoryError("std::bad_alloc")

    monkeypatch.setattr("oracles.fake_builder.Builder.build_serialized_network", burst)
    with pytest.raises(EngineError, match="small: not built, out of memory | build for a smaller"):
        built(BuildSettings(engine="tensorrt"))


def test_the_classic_one_needs_a_device(
    classic: FakeTensorRT, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing() -> None:
        raise EngineError("no CUDA device 0", got="0 devices")

    monkeypatch.setattr(plan_target, "Device", nothing)
    with pytest.raises(EngineError) as caught:
        build_target(BuildSettings(engine="tensorrt"))
    assert "got no CUDA device 0: 0 devices" in str(caught.value)
    assert "--engine tensorrt-rtx" in str(caught.value)


def test_a_missing_tensorrt_is_named() -> None:
    with pytest.raises(MissingPackageError, match="tensorrt"):
        build_target(BuildSettings(engine="tensorrt"))


def test_the_stand_in_reads_dtypes_as_the_real_one() -> None:
    fake = FakeTensorRT()
    for onnx_type, real in (
        (TensorProto.FLOAT, tensorrt_rtx.float32),
        (TensorProto.UINT8, tensorrt_rtx.uint8),
        (TensorProto.INT64, tensorrt_rtx.int64),
    ):
        assert np.dtype(fake.nptype(onnx_type)) == np.dtype(tensorrt_rtx.nptype(real))
