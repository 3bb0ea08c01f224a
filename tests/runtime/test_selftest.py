"""The self-test passes what is right, and names what is not, whatever is wrong with it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import standin
from sld_edge.engines.base import Array, Engine
from sld_edge.engines.errors import EngineError, InputError
from sld_edge.engines.tensorrt.plan_info import Flavour
from sld_edge.runtime.bundle import Bundle
from sld_edge.runtime.loader import Loader
from sld_edge.runtime.manifest import Component
from sld_edge.runtime.selftest import comparison, pictures, self_test
from sld_edge.runtime.selftest.miniature import FORMS
from standin.cuda import FakeCuda
from standin.faults import quick
from standin.plans import make_plans

REPEATED = ("the same seed again", "batches of 1", "out of memory", "after a restart")
Change = Callable[[Mapping[str, Array], dict[str, Array]], Mapping[str, Array]]


class Wrong:
    """An engine that changes inputs, or what another gives, in every form."""

    def __init__(self, engine: Engine, change: Change, swap: tuple[str, str] | None) -> None:
        self.engine, self.change, self.swap = engine, change, swap
        self.inputs, self.outputs = engine.inputs, engine.outputs

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        if self.swap is not None:
            one, other = self.swap
            feeds = {**feeds, one: feeds[other], other: feeds[one]}
        found = self.engine.run(feeds)
        return {**found, **self.change(feeds, found)}

    def close(self) -> None:
        self.engine.close()

    def __enter__(self) -> Wrong:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def unchanged(feeds: Mapping[str, Array], found: dict[str, Array]) -> Mapping[str, Array]:
    return {}


@pytest.fixture
def make_wrong(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make a component wrong on the tested side only: the other one loads the graphs itself."""

    def make(name: str, change: Change = unchanged, swap: tuple[str, str] | None = None) -> None:
        right = Loader.load

        def load(loader: Loader, asked: str, component: Component) -> Engine:
            engine = right(loader, asked, component)
            return Wrong(engine, change, swap) if asked == name else engine

        monkeypatch.setattr(Loader, "load", load)

    return make


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form and the images that tell most, for the time's sake."""
    quick(monkeypatch)


def failures(lines: list[str]) -> list[str]:
    return [line.removeprefix("  FAIL  ") for line in lines if line.startswith("  FAIL")]


def test_the_cpu_passes(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLD_EDGE_THREADS", raising=False)
    assert self_test("cpu", say=lines.append)
    assert lines[-1] == "self-test of cpu: pass"
    assert not failures(lines)
    told = "\n".join(lines)
    assert "in fp16; the UNet runs on cpu fp16, attention op" in told
    for form in FORMS:
        for name, component in Bundle.open().manifest.components.items():
            for spec in component.outputs:
                assert f"  pass  {form} {name}: {spec.name}: " in told
        for sampler in ("ddim", "euler-a"):
            for preset in ("off", "medium", "max"):
                assert f"  pass  {form} {sampler}, safety {preset}: mean 0.0" in told
        for name in ("the same seed again", "batches of 1, 2 and 4", "after a restart"):
            assert f"  pass  {form} {name}: " in told
        assert f"  none  {form} with and without CUDA graphs: " in told
    assert told.count("finite [-1.0, 1.0], wanted [-1.0, 1.0]") == 2 * 6
    assert told.count("finite [0.0, 1.0], wanted [0.0, 1.0]") == 2
    assert told.count("vae_decoder, nan in latents: finite [0.0], wanted [0.0]") == 2


def flipped(name: str) -> Change:
    return lambda feeds, found: {name: -found[name]}


def scaled(name: str, factor: float) -> Change:
    return lambda feeds, found: {name: found[name] * np.float32(factor)}


def all_is_well(feeds: Mapping[str, Array], found: dict[str, Array]) -> Mapping[str, Array]:
    return {"finite": np.ones_like(found["finite"])}


def half_seen(feeds: Mapping[str, Array], found: dict[str, Array]) -> Mapping[str, Array]:
    """NaN in a prediction is taken for latents that overflowed."""
    return {"finite": np.maximum(found["finite"], 0)}


def branches_turned(feeds: Mapping[str, Array], found: dict[str, Array]) -> Mapping[str, Array]:
    predicted = found["noise_pred"]
    return {"noise_pred": np.roll(predicted, len(feeds["latents"]), axis=0)}


def brighter(feeds: Mapping[str, Array], found: dict[str, Array]) -> Mapping[str, Array]:
    return {"images": np.minimum(found["images"], 254) + np.uint8(1)}


def not_a_number(feeds: Mapping[str, Array], found: dict[str, Array]) -> Mapping[str, Array]:
    return {"hidden_states": np.full_like(found["hidden_states"], np.nan)}


def cut(feeds: Mapping[str, Array], found: dict[str, Array]) -> Mapping[str, Array]:
    return {"images": found["images"][:0]}


@pytest.mark.usefixtures("one_image")
@pytest.mark.parametrize(
    ("component", "change", "swap", "named"),
    [
        ("unet", flipped("noise_pred"), None, "unet: noise_pred: relative error 2.0e+00"),
        ("unet", scaled("noise_pred", 1.003), None, "unet: noise_pred: relative error 3.0e-03"),
        ("unet", branches_turned, None, "unet: noise_pred"),
        ("text_encoder", not_a_number, None, "text_encoder: hidden_states: relative error nan"),
        ("vae_decoder", brighter, None, "vae_decoder: images: mean "),
        ("vae_decoder", all_is_well, None, "vae_decoder, nan in latents: finite [1.0]"),
        ("vae_decoder", cut, None, "vae_decoder: images: uint8 [0, 64, 64, 3], wanted"),
        (
            "guidance",
            unchanged,
            ("noise_pred_uncond", "noise_pred_text"),
            "guidance: latents_next: relative",
        ),
        ("guidance", scaled("share", 1.01), None, "guidance: share: relative error 1.0e-02"),
        ("guidance", all_is_well, None, "guidance, nan in noise_pred_text: finite [1.0, 1.0]"),
        ("guidance", half_seen, None, "guidance, inf in noise_pred_safety: finite [0.0, 1.0]"),
    ],
)
def test_what_is_wrong_is_named(
    make_wrong: Callable[..., None],
    lines: list[str],
    component: str,
    change: Change,
    swap: tuple[str, str] | None,
    named: str,
) -> None:
    make_wrong(component, change, swap)
    assert not self_test("cpu", say=lines.append)
    found = failures(lines)
    assert any(line.startswith(f"fp16 {named}") for line in found), found
    # Nothing but this component, and the pictures made with it.
    whole = {"euler-a", *REPEATED}
    names = {line.split(" ", 1)[1].split(":")[0].split(",")[0] for line in found}
    assert names <= {component, *whole}
    assert lines[-1].startswith(f"self-test of cpu: FAIL: fp16 {component}")
    assert f"| the first wrong component: fp16 {component} |" in lines[-1]


@pytest.mark.usefixtures("one_image")
def test_a_wrong_loop_fails_though_every_component_is_right(
    monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    """Safety that the tested side alone leaves out, as a loop with a mistake in it would."""
    right = pictures.made

    def images(pipeline: Any, sampler: str, preset: str) -> Any:
        return right(pipeline, sampler, "off")

    monkeypatch.setattr(comparison, "made", images)  # the reference uses its own name for it
    assert not self_test("cpu", say=lines.append)
    name = "fp16 euler-a, safety medium"
    assert [line.split(":")[0] for line in failures(lines)] == [name]
    assert "finding: every fp16 component is right alone; a single picture" in "\n".join(lines)
    assert lines[-1].startswith(f"self-test of cpu: FAIL: {name} | update")


@pytest.mark.usefixtures("one_image")
def test_a_component_that_does_not_run_is_named_and_the_others_go_on(
    make_wrong: Callable[..., None], lines: list[str]
) -> None:
    def fail(feeds: Mapping[str, Array], found: dict[str, Array]) -> Mapping[str, Array]:
        raise EngineError("unet.plan: TensorRT did not run it", got="no kernel")

    make_wrong("unet", fail)
    assert not self_test("cpu", say=lines.append)
    text = "unet.plan: TensorRT did not run it | got no kernel"
    names = ("unet", "euler-a, safety medium", "the same seed again", "batches of 1, 2 and 4")
    assert failures(lines) == [f"fp16 {name}: {text}" for name in (*names, "after a restart")]
    assert sum(line.startswith("  pass") for line in lines) > 10
    assert lines[-1].startswith(
        "self-test of cpu: FAIL: fp16 unet; fp16 euler-a, safety medium; fp16 the same seed again "
        "and 2 more | the first wrong component: fp16 unet | "
    )


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return standin.install(monkeypatch)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SLD_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Builder:
    """Builds plans for the stand-in, and remembers where."""

    def __init__(self) -> None:
        self.built: list[Path] = []

    def __call__(self, bundle: Path, flavour: str) -> None:
        name: Flavour = "tensorrt" if flavour == "tensorrt" else "tensorrt-rtx"
        make_plans(bundle, engine=name)
        self.built.append(bundle)


@pytest.mark.usefixtures("one_image", "cuda")
def test_plans_are_built_once_and_again_where_they_are_damaged(
    cache: Path, lines: list[str]
) -> None:
    flavour = "tensorrt-rtx"
    build = Builder()
    for _ in range(2):
        assert self_test(flavour, say=lines.append, build=build), lines
        assert lines[-1] == f"self-test of {flavour}: pass"
    (bundle,) = build.built
    assert bundle.parent == cache / "self-test"
    assert (bundle / "unet.plan").exists()
    (bundle / "unet.plan").write_bytes(b"garbage")
    (bundle / "bundle.json").write_text("{")
    assert self_test(flavour, say=lines.append, build=build)
    assert build.built == [bundle, bundle]
    assert self_test(flavour, say=lines.append), "plans that fit need no builder"


@pytest.mark.usefixtures("one_image", "cuda")
def test_without_a_cache_the_plans_go_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lines: list[str]
) -> None:
    monkeypatch.setenv("SLD_EDGE_CACHE", "off")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    build = Builder()
    assert self_test("tensorrt", say=lines.append, build=build), lines
    assert tmp_path in build.built[0].parents
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("one_image", "cuda", "cache")
def test_a_component_without_a_plan_is_said(lines: list[str]) -> None:
    build = Builder()

    def all_but_the_decoder(bundle: Path, flavour: str) -> None:
        build(bundle, flavour)
        for path in bundle.glob("vae_decoder.plan*"):
            path.unlink()

    assert self_test("tensorrt", say=lines.append, build=all_but_the_decoder), lines
    assert any(line.startswith("note: vae_decoder: ") and "cpu" in line for line in lines)


def test_a_provider_that_does_not_work_here_builds_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    standin.install(monkeypatch, driver=0)
    build = Builder()
    for name in ("tensorrt", "tensorrt-rtx", "cuda"):
        with pytest.raises(InputError, match=f"provider {name} does not work here"):
            self_test(name, say=lines.append, build=build)
    with pytest.raises(InputError, match="expected one of auto, cpu"):
        self_test("tpu", say=lines.append, build=build)
    assert not build.built
    assert not (cache / "self-test").exists()


@pytest.mark.usefixtures("cuda", "cache")
def test_without_a_builder_missing_plans_are_an_error(lines: list[str]) -> None:
    with pytest.raises(Exception, match="no bundle at"):
        self_test("tensorrt", say=lines.append)


@pytest.mark.usefixtures("one_image", "cuda")
def test_where_the_cache_cannot_be_made_the_plans_go_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    blocked = tmp_path / "a-file"
    blocked.write_text("")
    monkeypatch.setenv("SLD_EDGE_CACHE", str(blocked))
    build = Builder()
    assert self_test("tensorrt", say=lines.append, build=build)
    assert build.built
    assert blocked.read_text() == ""
