"""Runs with TensorRT plans, on a stand-in for the GPU: bit for bit what the CPU pipeline makes."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import standin
from sld_edge.engines.errors import BundleError, EngineError, InputError, NumericsError, UserError
from sld_edge.engines.tensorrt.plan_info import Flavour, info_path
from sld_edge.runtime import Pipeline, Result, Safety
from sld_edge.runtime.bundle import EMBEDDED
from sld_edge.runtime.commands.run import main
from sld_edge.runtime.plan_list import PLANS
from standin.cuda import FakeCuda
from standin.plans import VERSIONS, make_plans, relist

BOTH = pytest.mark.parametrize("flavour", list(VERSIONS))
PROMPTS = ["a red star at a party", "a blue heart in an alley"]
FAST: dict[str, Any] = {"steps": 4, "seed": 3}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return standin.install(monkeypatch)


@pytest.fixture
def planned(tmp_path: Path) -> Callable[..., Path]:
    """Make a copy of the miniature bundle with plans in it."""

    def make(flavour: Flavour = "tensorrt", **settings: Any) -> Path:
        bundle = Path(shutil.copytree(EMBEDDED, tmp_path / "mini"))
        given = {"version": VERSIONS[flavour], "compute_capabilities": ("8.6",), **settings}
        make_plans(bundle, engine=flavour, **given)
        return bundle

    return make


@pytest.fixture
def cpu() -> Iterator[Pipeline]:
    with Pipeline.load(provider="cpu") as pipeline:
        yield pipeline


def assert_same(got: Result, wanted: Result) -> None:
    """The same to the last bit: latents, edit maps, pictures, and what safety did."""
    np.testing.assert_array_equal(got.latents, wanted.latents)
    np.testing.assert_array_equal(got.edit_maps, wanted.edit_maps)
    for image, right in zip(got.images, wanted.images, strict=True):
        assert image.tobytes() == right.tobytes()
    for ours, theirs in zip(got.reports, wanted.reports, strict=True):
        assert ours["safety"] == theirs["safety"]
        for key in ("timestep", "branches", "cached", "share", "strength", "concept_strength"):
            assert [c[key] for c in ours["calls"]] == [c[key] for c in theirs["calls"]]


@BOTH
@pytest.mark.parametrize(
    "settings",
    [
        {"safety": "medium"},
        {"safety": "weak", "steps": 7},  # two branches, then three
        {"safety": "off", "guidance_scale": 1},  # one
        {"safety": "weak", "steps": 7, "guidance_scale": 1},  # one, then three
        {"safety": ["off", "max"], "guidance_scale": [1.0, 7.5]},
        {"sampler": "euler-a", "safety": "strong"},  # fresh noise at every call
        {"sampler": "pndm", "steps": 6},  # history
        {"sampler": "unipc"},
        {"sampler": "ddim", "eta": 0.5},
        {"count": 2, "negative_prompt": "blue"},
        {"width": 96, "height": 64},
        {"safety_concept": ("a skull", "the colour red", "snow")},
        {"safety": "weak", "steps": 7, "safety_concept": [("red", "blue"), "a skull"]},
        {"safety": "early", "steps": 7},  # three, then two
        {"safety": "guard-max"},
        {"safety": "guard-lite", "negative_prompt": "blue"},
        {"safety": ["guard", "weak"], "steps": 7},  # one needs the branch until its stop
        {"safety": "early", "steps": 7, "cache_interval": 2},
        {"safety": Safety(stop_step=2, warmup_steps=0), "guidance_scale": 1},  # three, then one
        {"cache_interval": 2},
        {"cache_interval": 3, "safety": "weak", "steps": 7},  # two branches, then three
        {"cache_interval": 2, "safety": "off", "guidance_scale": 1, "sampler": "pndm"},
        {"cache_interval": 2, "safety_concept": ("a skull", "red", "snow")},
    ],
    ids=str,
)
def test_the_device_makes_what_the_cpu_makes(
    flavour: Flavour,
    settings: dict[str, Any],
    cuda: FakeCuda,
    cpu: Pipeline,
    planned: Callable[..., Path],
) -> None:
    given = {**FAST, **settings}
    images = len(PROMPTS) * given.get("count", 1)
    plans = planned(flavour, size=(64, 64, 96), concepts=3)
    with Pipeline.load(plans, provider=flavour) as pipeline:
        assert dict(pipeline.fallbacks) == {}
        assert set(pipeline.providers.values()) == {flavour}
        assert_same(
            pipeline(PROMPTS, batch_size=images, **given), cpu(PROMPTS, batch_size=images, **given)
        )


def test_a_check_of_one_plan_says_nothing_of_another(
    cuda: FakeCuda, cpu: Pipeline, planned: Callable[..., Path]
) -> None:
    """A plan is not in the bundle's hash, and gives the embeddings that are compared once."""
    with Pipeline.load(planned(), provider="tensorrt") as pipeline:
        known = {p._loader.identity_of("text_encoder") for p in (cpu, pipeline)}
        plan = pipeline._loader.plans["text_encoder"]
        other = replace(plan, info=replace(plan.info, sha256="0" * 64))
        pipeline._loader.plans["text_encoder"] = other
        known.add(pipeline._loader.identity_of("text_encoder"))
    assert len(known) == 3


def test_plans_for_fewer_concepts_say_so(cuda: FakeCuda, planned: Callable[..., Path]) -> None:
    with Pipeline.load(planned(concepts=2), provider="tensorrt") as pipeline:
        pipeline("a red star", safety_concept=("a skull", "snow"), **FAST)
        with pytest.raises(EngineError, match="not built for 3 safety .* sld-build --concepts 3"):
            pipeline("a red star", safety_concept=("a skull", "snow", "red"), **FAST)


def test_more_concepts_take_the_place_of_images(
    cuda: FakeCuda, planned: Callable[..., Path]
) -> None:
    """With a plan of the UNet alone its batch, 3 branches of 4 images, is all that counts."""
    with Pipeline.load(planned(components=["unet"]), provider="tensorrt") as pipeline:
        largest = [pipeline._loader.largest_batch(concepts) for concepts in (1, 2, 3, 4, 10)]
        assert largest == [4, 3, 2, 2, 1]
        with pytest.raises(EngineError, match="--concepts 11"):
            pipeline._loader.largest_batch(11)
        pipeline(PROMPTS * 2, safety_concept=("a skull", "snow"), **FAST)


def test_the_second_run_finds_everything_laid_out(
    cuda: FakeCuda, cpu: Pipeline, planned: Callable[..., Path]
) -> None:
    with Pipeline.load(planned(), provider="tensorrt") as pipeline:
        pipeline("a red star", safety="medium", steps=6)
        before = cuda.counts.copy()
        got = pipeline("a blue heart", safety="medium", steps=6)
        for name in ("cudaMalloc", "cudaFree", "cudaGraphInstantiate", "cudaEventCreateWithFlags"):
            assert cuda.counts[name] == before[name], name
    assert_same(got, cpu("a blue heart", safety="medium", steps=6))
    assert not cuda.live_allocations()
    assert not cuda.live_handles()


def test_nothing_crosses_to_the_host_inside_the_loop(
    cuda: FakeCuda, planned: Callable[..., Path]
) -> None:
    with Pipeline.load(planned(), provider="tensorrt") as pipeline:
        plan = pipeline.resolve(standin.request("a red star", steps=8, sampler="euler-a"))
        seen = []
        for step in pipeline.steps(plan):
            if step.index == 1:
                cuda.log.clear()  # buffers are laid out, the first calls have settled the shapes
            if step.index == 7:
                seen = list(cuda.log)
    names = {entry.name for entry in seen}
    kinds = {entry.kind for entry in seen if entry.name == "cudaMemcpyAsync"}
    assert names <= {
        "cudaMemcpyAsync",
        "cudaGraphLaunch",
        "cudaStreamBeginCapture",
        "cudaStreamEndCapture",
        "cudaGraphInstantiate",
        "cudaGraphDestroy",
        "cudaEventRecord",
        "cudaEventSynchronize",
        "kernel",
    }
    assert kinds == {"device to device"}
    assert (
        sum(entry.name == "cudaMemcpyAsync" for entry in seen) == 6 * 3
    )  # numbers, noise, figures


def test_one_graph_a_call(cuda: FakeCuda, planned: Callable[..., Path]) -> None:
    with Pipeline.load(planned(), provider="tensorrt") as pipeline:
        pipeline("a red star", steps=10, safety="strong")
    assert cuda.counts["cudaGraphInstantiate"] == 2  # one a turn
    assert cuda.counts["cudaGraphLaunch"] == 8  # the first call of each turn runs by itself


def test_graphs_can_be_switched_off(
    cuda: FakeCuda, cpu: Pipeline, planned: Callable[..., Path]
) -> None:
    with Pipeline.load(planned(), provider="tensorrt", cuda_graph=False) as pipeline:
        got = pipeline("a red star", **FAST)
    assert cuda.counts["cudaGraphLaunch"] == 0
    assert_same(got, cpu("a red star", **FAST))


def test_rtx_captures_by_itself(cuda: FakeCuda, planned: Callable[..., Path]) -> None:
    with Pipeline.load(planned("tensorrt-rtx"), provider="tensorrt-rtx") as pipeline:
        pipeline("a red star", **FAST)
    assert cuda.counts["cudaGraphLaunch"] == 0


def test_one_graph_for_whole_and_for_cached_calls(
    cuda: FakeCuda, planned: Callable[..., Path]
) -> None:
    with Pipeline.load(planned(), provider="tensorrt") as pipeline:
        pipeline("a red star", steps=18, safety="strong", cache_interval=3)
    assert cuda.counts["cudaGraphInstantiate"] == 4  # one a turn, for either
    # Each runs by itself first, and once more when the shallow one has asked for more workspace.
    assert cuda.counts["cudaGraphLaunch"] == 18 - 5


def test_both_turns_share_the_context_of_the_unet(
    cuda: FakeCuda, planned: Callable[..., Path]
) -> None:
    """Only guidance reads and writes the state, which has two buffers."""
    with Pipeline.load(planned(), provider="tensorrt") as pipeline:
        pipeline("a red star", steps=18, safety="strong", cache_interval=3)
    contexts = Counter(sys.modules["tensorrt"].shared.contexts)
    # Guidance in two turns, after whole and after cached calls.
    assert (contexts["unet"], contexts["unet_shallow"], contexts["guidance"]) == (1, 1, 4)


def test_decoders_get_pictures_one_by_one(cuda: FakeCuda, planned: Callable[..., Path]) -> None:
    """Their plans take no more, as sld-build builds them."""
    bundle = planned()
    one_by_one = ("vae_decoder", "text_encoder")
    make_plans(bundle, engine="tensorrt", batch=(1, 1, 1), components=one_by_one)
    with Pipeline.load(bundle, provider="tensorrt") as pipeline:
        assert len(pipeline("a red star", count=2, **FAST).images) == 2


def test_with_and_without_savings_in_turn(
    cuda: FakeCuda, cpu: Pipeline, planned: Callable[..., Path]
) -> None:
    with Pipeline.load(planned(), provider="tensorrt") as pipeline:
        for savings in ({}, {"cache_interval": 2}, {"cache_interval": 3}, {}):
            given: dict[str, Any] = {**FAST, "steps": 6, "safety": "max", **savings}
            assert_same(pipeline("a red star", **given), cpu("a red star", **given))
    assert not cuda.live_allocations()


def test_without_a_plan_of_the_shallow_unet(
    cuda: FakeCuda, cpu: Pipeline, planned: Callable[..., Path]
) -> None:
    with Pipeline.load(planned(components=("unet", "guidance")), provider="tensorrt") as pipeline:
        got = pipeline("a red star", cache_interval=2, **FAST)
        assert pipeline.providers["unet_shallow"] == "cpu"
    assert_same(got, cpu("a red star", cache_interval=2, **FAST))


def test_another_size_or_batch_lays_out_anew(
    cuda: FakeCuda, cpu: Pipeline, planned: Callable[..., Path]
) -> None:
    with Pipeline.load(planned(size=(64, 64, 128)), provider="tensorrt") as pipeline:
        changes: list[dict[str, Any]] = [{}, {"count": 3}, {"width": 128, "height": 96}, {}]
        for settings in changes:
            got = pipeline("a red star", **FAST, **settings)
            batch = settings.get("count", 1)
            assert_same(got, cpu("a red star", batch_size=batch, **FAST, **settings))
    assert not cuda.live_allocations()


def test_a_larger_workspace_makes_new_graphs(
    cuda: FakeCuda, cpu: Pipeline, planned: Callable[..., Path]
) -> None:
    """The decoder's, after the loop's graphs hold the smaller one's address."""
    with Pipeline.load(planned(), provider="tensorrt") as pipeline:
        device = pipeline._loader.device
        pipeline("a red star", steps=8)
        device.workspace.require(2 * device.workspace.nbytes)
        assert_same(pipeline("a blue heart", steps=8), cpu("a blue heart", steps=8))


@pytest.mark.parametrize("have", [("unet",), ("unet", "guidance"), ("guidance", "vae_decoder")])
def test_what_has_no_plan_runs_elsewhere(
    have: tuple[str, ...], cuda: FakeCuda, cpu: Pipeline, planned: Callable[..., Path]
) -> None:
    with Pipeline.load(planned(components=have), provider="tensorrt") as pipeline:
        got = pipeline("a red star", **FAST)
        assert set(pipeline.fallbacks) == set(pipeline.bundle.manifest.components) - set(have)
        for name, why in pipeline.fallbacks.items():
            assert why == "no tensorrt plan of it: runs on cpu"
            assert pipeline.providers[name] == "cpu"
    assert_same(got, cpu("a red star", **FAST))


def test_batches_are_no_larger_than_the_plans(
    cuda: FakeCuda, cpu: Pipeline, planned: Callable[..., Path]
) -> None:
    with Pipeline.load(planned(batch=(1, 2, 2)), provider="tensorrt") as pipeline:
        got = pipeline("a red star", count=5, **FAST)
        assert [report["seconds"]["batch_size"] for report in got.reports] == [2, 2, 2, 2, 1]
        with pytest.raises(EngineError, match="--batch"):
            pipeline("a red star", count=5, batch_size=3, **FAST)
    assert_same(got, cpu("a red star", count=5, batch_size=2, **FAST))


def test_low_memory_holds_what_it_needs(
    cuda: FakeCuda, cpu: Pipeline, planned: Callable[..., Path]
) -> None:
    with Pipeline.load(planned(), provider="tensorrt", low_memory=True) as pipeline:
        got = pipeline("a red star", **FAST)
        assert set(pipeline._executor.store.engines) == {"unet", "guidance"}
        pipeline("a blue heart", **FAST)
    assert_same(got, cpu("a red star", **FAST))


def test_tiles_are_of_the_size_that_a_plan_takes(
    cuda: FakeCuda, planned: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = np.random.default_rng(0).standard_normal((1, 4, 24, 28), np.float32)
    with Pipeline.load(planned(), provider="tensorrt", vae_tiling="on") as pipeline:
        got = pipeline.decode(latents)  # the plan takes 16 by 16 cells, and nothing else
    monkeypatch.setattr("sld_edge.runtime.tiles._SIDE", 16)
    with Pipeline.load(provider="cpu", vae_tiling="on") as pipeline:
        np.testing.assert_array_equal(got, pipeline.decode(latents))


@pytest.mark.parametrize("sampler", ["ddim", "euler-a"])
def test_steps_can_be_looked_at_on_the_way(
    sampler: str, cuda: FakeCuda, cpu: Pipeline, planned: Callable[..., Path]
) -> None:
    def walk(pipeline: Pipeline) -> list[tuple[Any, ...]]:
        plan = pipeline.resolve(standin.request("a red star", steps=5, sampler=sampler))
        return [
            (step.index, step.latents.copy(), step.share, step.strength, step.edit_map.copy())
            for step in pipeline.steps(plan)
        ]

    with Pipeline.load(planned(), provider="tensorrt") as pipeline:
        for ours, theirs in zip(walk(pipeline), walk(cpu), strict=True):
            for got, wanted in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(got, wanted)


def test_a_run_that_was_stopped_leaves_the_next_one_right(
    cuda: FakeCuda, cpu: Pipeline, planned: Callable[..., Path]
) -> None:
    def stop(step: Any) -> None:
        if step.index == 2:
            raise KeyboardInterrupt

    with Pipeline.load(planned(), provider="tensorrt") as pipeline:
        with pytest.raises(KeyboardInterrupt):
            pipeline("a red star", callback=stop, **FAST)
        assert_same(pipeline("a red star", **FAST), cpu("a red star", **FAST))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_is_named_by_component_and_call(
    bad: float, cuda: FakeCuda, planned: Callable[..., Path]
) -> None:
    def spoil(step: Any) -> None:
        if step.index == 2:  # the next call's UNet reads this
            stage = pipeline._executor.stage
            assert stage is not None
            tensor = stage.arena["context"]
            stage.device.upload(tensor, np.full(tensor.shape, bad, np.float32))

    with (
        Pipeline.load(planned(), provider="tensorrt") as pipeline,
        pytest.raises(NumericsError, match="unet: NaN or infinity at call 4 of 6"),
    ):
        pipeline("a red star", steps=6, callback=spoil)


# --- what is refused ----------------------------------------------------------------------------


def refused(bundle: Path, **settings: Any) -> str:
    with pytest.raises(UserError) as caught:
        Pipeline.load(bundle, **{"provider": "tensorrt", **settings})
    return str(caught.value)


def test_a_plan_for_another_device(monkeypatch: pytest.MonkeyPatch, planned: Any) -> None:
    standin.install(monkeypatch, compute_capability=(8, 7))
    says = refused(planned())
    assert "built for compute capability 8.6 | the device here has 8.7" in says
    assert "sld-build" in says
    assert "--provider cpu" in says


def test_a_plan_of_another_version(cuda: FakeCuda, planned: Any) -> None:
    says = refused(planned(version="10.9.0"))
    assert "built with tensorrt 10.9.0 | here is 10.3.0" in says


def test_a_version_compatible_plan_of_an_earlier_version(cuda: FakeCuda, planned: Any) -> None:
    bundle = planned(version="10.1.0", options={"version_compatible": True})
    with Pipeline.load(bundle, provider="tensorrt") as pipeline:
        pipeline("a star", **FAST)


def test_a_hardware_compatible_plan(monkeypatch: pytest.MonkeyPatch, planned: Any) -> None:
    standin.install(monkeypatch, compute_capability=(8, 9))
    bundle = planned(options={"hardware_compatible": True})
    with Pipeline.load(bundle, provider="tensorrt") as pipeline:
        pipeline("a star", **FAST)


def _edit(path: Path, **changes: Any) -> None:
    body = json.loads(path.read_text())
    path.write_text(json.dumps({**body, **changes}))


def test_a_plan_for_another_system(cuda: FakeCuda, planned: Any) -> None:
    bundle = planned()
    _edit(info_path(bundle / "unet.plan"), system="windows x86_64")
    relist(bundle)
    assert "it was built for windows x86_64 | here is linux" in refused(bundle)


def test_a_plan_of_other_weights(cuda: FakeCuda, planned: Any) -> None:
    bundle = planned()
    _edit(info_path(bundle / "unet.plan"), source_sha256="0" * 64)
    relist(bundle)
    assert "built from another unet than this bundle's" in refused(bundle)


def test_a_plan_that_was_exchanged(cuda: FakeCuda, planned: Any) -> None:
    bundle = planned()
    plan = bundle / "unet.plan"
    plan.write_bytes(plan.read_bytes() + b" ")
    says = refused(bundle)
    assert "a plan is code" in says
    assert "--trust-plan" in says
    with Pipeline.load(bundle, provider="tensorrt", trust_plan=True) as pipeline:
        pipeline("a star", **FAST)


def test_a_bundle_that_does_not_name_its_plans(cuda: FakeCuda, planned: Any) -> None:
    bundle = planned()
    _edit(bundle / PLANS, plans={})
    assert "a plan is code" in refused(bundle)


def test_a_plan_without_its_description(cuda: FakeCuda, planned: Any) -> None:
    bundle = planned()
    info_path(bundle / "unet.plan").unlink()
    assert "no description of the plan" in refused(bundle)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("{", "not whole JSON"),
        ("[]", "got list | expected a JSON object"),
        ('{"format": "sld-edge-plan", "format_version": 9}', "format version | got 9"),
        ('{"format": "sld-edge-plan", "format_version": 2}', "lacks an entry"),
    ],
)
def test_a_damaged_description(change: str, says: str, cuda: FakeCuda, planned: Any) -> None:
    bundle = planned()
    info_path(bundle / "unet.plan").write_text(change)
    assert "a plan is code" in refused(bundle)  # it is not even read
    with pytest.raises(EngineError) as caught:
        Pipeline.load(bundle, provider="tensorrt", trust_plan=True)
    assert says in str(caught.value)


def test_no_plan_of_the_flavour(cuda: FakeCuda, planned: Any) -> None:
    says = refused(planned("tensorrt-rtx"))
    assert "has no plan for tensorrt | got plans for tensorrt-rtx" in says
    assert "got no plan" in refused(EMBEDDED)


def test_a_plan_and_another_provider(cuda: FakeCuda, planned: Any) -> None:
    with pytest.raises(InputError, match="is a plan for tensorrt .* got --provider cuda"):
        Pipeline.load(plan=planned() / "unet.plan", provider="cuda")


def test_a_plan_without_a_bundle(cuda: FakeCuda, planned: Any, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no plan at"):
        Pipeline.load(plan=tmp_path / "unet.plan")
    alone = tmp_path / "a" / "b" / "c"
    alone.mkdir(parents=True)
    shutil.copy(planned() / "unet.plan", alone)
    with pytest.raises(BundleError, match="no bundle beside"):
        Pipeline.load(plan=alone / "unet.plan")


def test_plans_that_lie_elsewhere(cuda: FakeCuda, cpu: Pipeline, planned: Any) -> None:
    bundle = planned()
    elsewhere = bundle.parent / "plans"
    elsewhere.mkdir()
    for path in bundle.glob("*.plan*"):
        shutil.move(path, elsewhere)
    with Pipeline.load(bundle, plan=elsewhere / "unet.plan") as pipeline:
        assert pipeline.provider == "tensorrt"
        assert_same(pipeline("a red star", **FAST), cpu("a red star", **FAST))


def test_a_size_the_plan_was_not_built_for(cuda: FakeCuda, planned: Any) -> None:
    with (
        Pipeline.load(planned(), provider="tensorrt") as pipeline,
        pytest.raises(EngineError, match=r"unet.plan: shape of latents .* expected .*--size"),
    ):
        pipeline("a star", width=128, height=128, **FAST)


def test_a_size_whose_branches_do_not_lie_on_256_bytes(cuda: FakeCuda, planned: Any) -> None:
    with (
        Pipeline.load(planned(size=(64, 64, 96)), provider="tensorrt") as pipeline,
        pytest.raises(EngineError, match="multiples of 32"),
    ):
        pipeline("a star", width=72, height=72, **FAST)


def test_out_of_device_memory(monkeypatch: pytest.MonkeyPatch, planned: Any) -> None:
    standin.install(monkeypatch, total_memory=100_000)
    with (
        Pipeline.load(planned(), provider="tensorrt") as pipeline,
        pytest.raises(EngineError, match="CUDA: cudaMalloc failed .* --low-memory"),
    ):
        pipeline("a star", **FAST)


# --- choosing -----------------------------------------------------------------------------------


def test_auto_takes_plans_that_fit_and_says_why(cuda: FakeCuda, planned: Any) -> None:
    with Pipeline.load(planned("tensorrt-rtx")) as pipeline:
        assert pipeline.provider == "tensorrt-rtx"
        assert "plans of this bundle fit" in pipeline.why


def test_auto_passes_over_plans_that_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, planned: Any
) -> None:
    standin.install(monkeypatch, compute_capability=(12, 0))
    with Pipeline.load(planned()) as pipeline:
        assert pipeline.provider == "cpu"
        assert "built for compute capability 8.6" in pipeline.why


def test_the_command_runs_a_plan(
    cuda: FakeCuda, planned: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = planned(components=("unet", "guidance", "vae_decoder"))
    picture, report = tmp_path / "star.png", tmp_path / "star.json"
    made = ["--output", str(picture), "--report", str(report)]
    given = ["--engine", str(bundle / "unet.plan"), "--steps", "3"]
    code = main(["a red star", *given, *made, "--low-memory", "--no-cuda-graph"])
    assert code == 0
    said = capsys.readouterr().err
    assert "note: text_encoder: no tensorrt plan of it: runs on cpu" in said
    body = json.loads(report.read_text())["images"][0]
    assert body["provider"] == "tensorrt"
    assert all(call["seconds"] > 0 for call in body["calls"])


def test_the_command_refuses_in_one_line(
    cuda: FakeCuda, planned: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = planned(version="10.9.0") / "unet.plan"
    assert main(["a star", "--engine", str(plan)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
