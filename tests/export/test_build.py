"""`sld-build`: plans of whole bundles, for real with TensorRT-RTX; the classic one imitated."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_rtx

from oracles.fake_builder import FakeDevice, FakeTensorRT
from oracles.models import save_diffusers_directory
from oracles.tokenizers import VOCAB_SIZE, save_tokenizer
from sld_edge.engines.errors import (
    BundleError,
    EngineError,
    InputError,
    MissingPackageError,
    OutputError,
)
from sld_edge.engines.onnxruntime.engine import OrtEngine
from sld_edge.engines.staging import locked
from sld_edge.engines.tensorrt import build as plan_build
from sld_edge.engines.tensorrt import target as plan_target
from sld_edge.engines.tensorrt.build_settings import BuildSettings
from sld_edge.engines.tensorrt.engine import Log
from sld_edge.engines.tensorrt.plan_info import PlanInfo, Span, info_path, plan_info_from_file
from sld_edge.export import build_plans as build
from sld_edge.export.build_plans import build_plans
from sld_edge.export.commands import export as export_cli
from sld_edge.export.commands.build import PlanOptions, build_settings, main
from sld_edge.runtime.bundle import EMBEDDED, Bundle
from sld_edge.runtime.manifest import MANIFEST
from sld_edge.runtime.plan_list import PLANS, plan_list
from sld_edge.runtime.plans import source_digest

COMPONENTS = tuple(Bundle.open().manifest.components)

ROOT = Path(__file__).parents[2]
CAPABILITIES = ("8.6", "8.9", "12.0")
RTX = BuildSettings(
    engine="tensorrt-rtx",
    compute_capabilities=CAPABILITIES,
    batch=Span(min=1, opt=2, max=4),
    size=Span(min=32, opt=64, max=96),
)
QUICK = ("guidance", "text_encoder")  # built in half a second each


def quick(**changes: Any) -> BuildSettings:
    given: dict[str, Any] = {
        "engine": "tensorrt-rtx",
        "compute_capabilities": ("8.6",),
        "components": QUICK,
        **changes,
    }
    return BuildSettings(**given)


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def command(*arguments: str) -> subprocess.Popen[str]:
    """Start `sld-build` in a process of its own."""
    paths = os.pathsep.join([str(ROOT / ".namespace"), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "sld_edge.export.commands.build", *arguments],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[PlanInfo]]:
    """The miniature bundle with all its plans, not to be changed."""
    folder = Path(shutil.copytree(EMBEDDED, tmp_path_factory.mktemp("plans") / "bundle"))
    return folder, build_plans(folder, RTX)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A copy of the miniature bundle with two quick plans, to be changed."""
    folder = Path(shutil.copytree(EMBEDDED, tmp_path / "bundle"))
    build_plans(folder, quick())
    return folder


@pytest.fixture
def classic(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeTensorRT:
    fake = FakeTensorRT()
    monkeypatch.setenv("SLD_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(plan_target, "tensorrt_module", lambda flavour: fake)
    monkeypatch.setattr(plan_target, "Device", FakeDevice)
    return fake


# --- what is built --------------------------------------------------------------------------------


def test_every_component_has_one_plan_for_all_capabilities(
    built: tuple[Path, list[PlanInfo]],
) -> None:
    folder, infos = built
    assert tuple(info.component for info in infos) == COMPONENTS
    manifest = Bundle.open(folder).manifest
    listed = plan_list(folder, Bundle.open(folder).sha256)
    assert tuple(listed) == COMPONENTS
    for info in infos:
        path = folder / f"{info.component}.plan"
        content = path.read_bytes()
        assert plan_info_from_file(info_path(path)) == info
        assert info.bytes == len(content) > 10_000
        assert info.sha256 == hashlib.sha256(content).hexdigest()
        entry, described = listed[info.component]
        digest = hashlib.sha256(info_path(path).read_bytes()).hexdigest()
        assert (described.path, described.sha256) == (info_path(path).name, digest)
        assert (entry.path, entry.sha256, entry.bytes) == (path.name, info.sha256, info.bytes)
        component = manifest.components[info.component]
        assert info.source_sha256 == source_digest(component)
        assert tuple(t.spec for t in info.inputs) == component.inputs
        assert tuple(t.spec for t in info.outputs) == component.outputs
        assert info.compute_capabilities == CAPABILITIES
        assert (info.engine, info.engine_version) == ("tensorrt-rtx", tensorrt_rtx.__version__)
        assert (info.precision, info.devices) == ("fp32", ())
        assert info.contents is not None
        assert info.contents.kernels > 0


def test_profiles_are_what_was_asked_for(built: tuple[Path, list[PlanInfo]]) -> None:
    profiles = {
        (info.component, tensor.spec.name): tensor.profile
        for info in built[1]
        for tensor in info.inputs
    }
    assert profiles["unet", "latents"] == ((1, 4, 8, 8), (2, 4, 16, 16), (4, 4, 24, 24))
    assert profiles["unet", "timestep"] == ((1,), (2,), (4,))
    # One to three branches an image: plain, guided, and with safety.
    assert profiles["unet", "context"] == ((1, 24, 96), (6, 24, 96), (12, 24, 96))
    # Texts are encoded one by one, and pictures decoded one by one.
    assert profiles["text_encoder", "input_ids"] == ((1, 24),) * 3
    assert profiles["vae_decoder", "latents"] == ((1, 4, 8, 8), (1, 4, 16, 16), (1, 4, 24, 24))
    assert profiles["guidance", "history"] == (
        (4, 1, 4, 8, 8),
        (4, 2, 4, 16, 16),
        (4, 4, 4, 24, 24),
    )
    assert profiles["guidance", "row"] == ((11,), (11,), (11,))


def test_only_plans_are_added_to_the_bundle(built: tuple[Path, list[PlanInfo]]) -> None:
    folder, _ = built
    before, after = snapshot(EMBEDDED), snapshot(folder)
    added = {f"{name}.plan{end}" for name in COMPONENTS for end in ("", ".json")}
    assert set(after) - set(before) == added | {PLANS}
    assert {name for name in before if before[name] != after[name]} == set()
    assert [path.name for path in folder.parent.iterdir()] == ["bundle"]


# --- what is built again --------------------------------------------------------------------------


def test_the_same_answers_are_not_built_again(small: Path) -> None:
    before = snapshot(small)
    said: list[str] = []
    stages: list[tuple[str, str]] = []
    infos = build_plans(small, quick(), say=said.append, watch=lambda *stage: stages.append(stage))
    assert [info.component for info in infos] == ["text_encoder", "guidance"]
    assert stages == []
    assert sum("nothing has changed" in line for line in said) == 2
    assert snapshot(small) == before


@pytest.mark.parametrize(
    ("changes", "anew"),
    [
        ({"compute_capabilities": ("8.9",)}, set(QUICK)),
        ({"optimization_level": 1}, set(QUICK)),
        ({"batch": Span(min=1, opt=1, max=2)}, {"guidance"}),  # texts are not images
        ({"size": Span(min=64, opt=64, max=80)}, {"guidance"}),
        ({"components": ("guidance",)}, set()),
    ],
)
def test_other_answers_are_built(small: Path, changes: dict[str, Any], anew: set[str]) -> None:
    stages = set()
    build_plans(small, quick(**changes), watch=lambda name, stage: stages.add(name))
    assert stages == anew


def damage_plan(folder: Path) -> None:
    path = folder / "guidance.plan"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def damage_description(folder: Path) -> None:
    (folder / "guidance.plan.json").write_text("{")


def forget_plan(folder: Path) -> None:
    body = json.loads((folder / PLANS).read_text())
    del body["plans"]["guidance"]
    (folder / PLANS).write_text(json.dumps(body))


def plant_plan(folder: Path) -> None:
    """Put another plan and a description that fits it where the bundle vouches for neither."""
    path = folder / "guidance.plan"
    path.write_bytes(b"code of someone else")
    info = json.loads(info_path(path).read_text())
    info["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    info_path(path).write_text(json.dumps(info))


@pytest.mark.parametrize("harm", [damage_plan, damage_description, forget_plan, plant_plan])
def test_what_is_not_the_bundles_own_plan_is_built_again(
    small: Path, harm: Callable[[Path], None]
) -> None:
    harm(small)
    stages = set()
    (info,) = build_plans(
        small, quick(components=("guidance",)), watch=lambda name, stage: stages.add(name)
    )
    assert stages == {"guidance"}
    assert info.sha256 == plan_list(small, Bundle.open(small).sha256)["guidance"][0].sha256
    assert len((small / "guidance.plan").read_bytes()) == info.bytes > 10_000
    assert plan_info_from_file(small / "guidance.plan.json") == info


def test_force_builds_all(small: Path) -> None:
    stages = set()
    build_plans(small, quick(), watch=lambda name, stage: stages.add(name), force=True)
    assert stages == set(QUICK)


# --- builds that do not come to their end ---------------------------------------------------------


def test_a_failed_build_leaves_the_bundle_as_it_was(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, before = plan_build.build_plan, snapshot(small.parent)

    def fail_at_the_second(draft: PlanInfo, *rest: Any, **options: Any) -> PlanInfo:
        if draft.component == "guidance":
            raise EngineError("out of luck")
        return real(draft, *rest, **options)

    monkeypatch.setattr(build, "build_plan", fail_at_the_second)
    with pytest.raises(EngineError, match="out of luck"):
        build_plans(small, quick(optimization_level=1))
    assert snapshot(small.parent) == before


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_build_leaves_the_bundle_as_it_was(small: Path, kind: signal.Signals) -> None:
    before = snapshot(small)
    arguments = ["--engine", "tensorrt-rtx", "--compute-capability", "8.6", "--force"]
    process = command(str(small), *arguments)

    def staged() -> list[Path]:
        return list(small.parent.glob(".bundle.plans.*.sld-part"))

    for _ in range(600):  # until the first plan is written and the UNet's build has begun
        if list(small.parent.glob(".bundle.plans.*.sld-part/text_encoder.plan.json")):
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(kind)
    _, said = process.communicate()
    assert process.returncode == (-9 if kind == signal.SIGKILL else 130), said
    assert snapshot(small) == before
    assert bool(staged()) == (kind == signal.SIGKILL)
    build_plans(small, quick())
    assert not staged()


def test_two_builds_of_one_bundle_do_not_meet(small: Path) -> None:
    with (
        locked(small / MANIFEST, shared=False),
        pytest.raises(OutputError, match="another sld-build is at work"),
    ):
        build_plans(small, quick(optimization_level=1))


def test_a_damaged_graph_is_not_built(small: Path) -> None:
    path = small / "guidance.onnx"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match="not the file that the bundle was made with"):
        build_plans(small, quick(optimization_level=1, components=("guidance",)))


def test_a_bundle_that_cannot_be_written_is_refused(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and real(path, mode))
    with pytest.raises(OutputError, match="cannot write to .* | got Permission denied"):
        build_plans(small, quick(optimization_level=1))


def test_a_bundle_that_is_a_disk_of_its_own_is_staged_inside(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.access
    seen = []
    monkeypatch.setattr(os, "access", lambda path, mode: path != small.parent and real(path, mode))
    build_plans(
        small,
        quick(optimization_level=1, components=("guidance",)),
        watch=lambda *_: seen.append(bool(list(small.glob(".plans.*.sld-part")))),
    )
    assert seen
    assert all(seen)
    assert not list(small.glob(".plans.*.sld-part"))


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"components": ("unet", "vae")},
            "component | got 'vae' | expected text_encoder, unet, unet_shallow, vae_decoder, "
            "guidance",
        ),
        (
            {"size": Span(min=64, opt=64, max=72)},
            "size | got 72 pixels | expected a multiple of 16",
        ),
        ({"compute_capabilities": ("8.7",)}, "compute capability 8.7 | expected one of 7.5, 8.0"),
        ({"compute_capabilities": ("9.0",)}, "compute capability 9.0 | expected one of 7.5, 8.0"),
        ({"compute_capabilities": ("7.5",)}, "compute capability 7.5 | got a graph in fp32"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    settings: dict[str, Any], message: str, bundle_copy: Path
) -> None:
    before = snapshot(bundle_copy.parent)
    with pytest.raises(InputError) as caught:
        build_plans(bundle_copy, quick(**settings))
    assert message in str(caught.value)
    assert snapshot(bundle_copy.parent) == before


def test_turing_takes_a_graph_without_products_in_fp32(bundle_copy: Path) -> None:
    settings = quick(compute_capabilities=("7.5",), components=("guidance",))
    (info,) = build_plans(bundle_copy, settings)
    assert info.compute_capabilities == ("7.5",)


def test_what_is_not_a_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle at"):
        build_plans(tmp_path, quick())


def test_decomposing_without_onnx_names_the_extra(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sld_edge.export.graphs.decompose", None)
    with pytest.raises(MissingPackageError, match=r"onnx .* pip install \"sld-edge\[export\]\""):
        build_plans(bundle_copy, quick())
    assert not list(bundle_copy.glob("*.plan"))


# --- FP16, and the forms --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoint") / "tiny"
    save_diffusers_directory(root, "sd1", vocab_size=VOCAB_SIZE)
    save_tokenizer(root / "tokenizer", pad="!")
    return root


@pytest.fixture(scope="module")
def exported(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint as bundles: FP16 with Attention, and FP32 without."""
    root, found = tmp_path_factory.mktemp("bundles"), {}
    for precision, attention in (("fp16", "op"), ("fp32", "decomposed")):
        found[precision] = root / precision
        options = ["--precision", precision, "--attention", attention, "--quiet"]
        arguments = ["--model", str(checkpoint), "--output", str(found[precision])]
        arguments += ["--preset", "medium"]
        assert export_cli.main([*arguments, "--width", "64", "--height", "64", *options]) == 0
    return found


@pytest.mark.parametrize("name", ["miniature", "fp16", "fp32"])
def test_the_parser_knows_every_operator(name: str, exported: Mapping[str, Path]) -> None:
    folder = {"miniature": EMBEDDED, **exported}[name]
    for component in COMPONENTS:
        log = Log(tensorrt_rtx)
        builder = tensorrt_rtx.Builder(log.logger)
        network = builder.create_network(1)
        parser = tensorrt_rtx.OnnxParser(network, log.logger)
        parsed = parser.parse_from_file(str(folder / f"{component}.onnx"))
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        assert (parsed, errors) == (True, []), component
        assert network.num_layers > 0


def test_a_bundle_with_the_operator_builds_and_its_plans_are_kept(
    exported: Mapping[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(exported["fp16"], tmp_path / "bundle"))
    said: list[str] = []
    settings = quick(components=("text_encoder", "vae_decoder"))
    # Heads of 8 and of 64 have no kernel as an operator.
    text, vae = build_plans(folder, settings, say=said.append)
    assert text.precision == vae.precision == "fp16"
    assert not list(folder.glob("*.decomposed.onnx*"))

    said.clear()
    build_plans(folder, settings, say=said.append)
    assert sum("nothing has changed" in line for line in said) == 2


@pytest.mark.parametrize(
    ("given", "batch", "size"),
    [
        ({}, Span(min=1, opt=1, max=1), None),
        ({"batch": (2,), "size": (64,)}, Span(min=2, opt=2, max=2), Span(min=64, opt=64, max=64)),
    ],
)
def test_static_plans_know_one_size_and_one_batch(
    given: dict[str, Any], batch: Span, size: Span | None
) -> None:
    settings = build_settings(PlanOptions(engine="tensorrt-rtx", static=True, **given))
    assert settings is not None
    assert (settings.batch, settings.size) == (batch, size)


@pytest.mark.parametrize("name", ["batch", "size"])
def test_static_plans_refuse_a_range(name: str) -> None:
    given: dict[str, Any] = {name: (1, 2, 4)}
    with pytest.raises(InputError, match=rf"--{name} .* got 3 .* one number with --static"):
        build_settings(PlanOptions(engine="tensorrt-rtx", static=True, **given))


def test_a_decomposed_bundle_needs_no_onnx(
    exported: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(exported["fp32"], tmp_path / "bundle"))
    monkeypatch.setitem(sys.modules, "sld_edge.export.graphs.decompose", None)
    (info,) = build_plans(folder, quick(components=("text_encoder",)))
    assert info.precision == "fp32"


# --- classic TensorRT, on the stand-in ------------------------------------------------------------


def said_of(folder: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((folder / f"{name}.plan").read_text()))


def test_tensorrt_10_3_gets_opset_20(classic: FakeTensorRT, bundle_copy: Path) -> None:
    infos = build_plans(bundle_copy, BuildSettings(engine="tensorrt"))
    assert tuple(info.component for info in infos) == COMPONENTS
    for info in infos:
        assert said_of(bundle_copy, info.component)["opset"] == 20
        assert (info.engine, info.devices) == ("tensorrt", ("Orin",))
        assert info.compute_capabilities == ("8.7",)
    assert not list(bundle_copy.glob("*.decomposed.onnx"))
    assert classic.caches[0] == b""
    assert set(classic.caches[1:]) == {b"10.3.0: measured"}


def test_a_stripped_plan_keeps_the_graph_it_is_filled_from(
    classic: FakeTensorRT, bundle_copy: Path
) -> None:
    settings = BuildSettings(
        engine="tensorrt", components=QUICK, strip_weights=True, version_compatible=True
    )
    text, guidance = build_plans(bundle_copy, settings)
    assert text.options["refit_from"] == "text_encoder.decomposed.onnx"
    assert guidance.options["refit_from"] == "guidance.onnx"
    assert text.options["strip_weights"] is text.options["version_compatible"] is True
    flags = ["REFIT_IDENTICAL", "STRICT_NANS", "STRIP_PLAN", "VERSION_COMPATIBLE"]
    assert said_of(bundle_copy, "text_encoder")["flags"] == flags
    # Its weights are the bundle's own file.
    with OrtEngine(bundle_copy / text.options["refit_from"], as_is=True) as engine:
        assert engine.run({"input_ids": np.zeros((1, 24), np.int64)})
    assert [path.name for path in bundle_copy.glob("*.data")] == [
        path.name for path in EMBEDDED.glob("*.data")
    ]

    said: list[str] = []
    build_plans(bundle_copy, settings, say=said.append)
    assert sum("nothing has changed" in line for line in said) == 2


def test_plans_of_the_other_flavour_are_replaced_and_it_is_said(
    small: Path, classic: FakeTensorRT
) -> None:
    said: list[str] = []
    settings = BuildSettings(engine="tensorrt", components=("guidance",))
    (info,) = build_plans(small, settings, say=said.append)
    assert "note: guidance: its plan for tensorrt-rtx is replaced" in said
    listed = plan_list(small, Bundle.open(small).sha256)
    assert listed["guidance"][0].sha256 == info.sha256
    text = plan_info_from_file(small / "text_encoder.plan.json")  # not asked for, so it stays
    assert text.engine == "tensorrt-rtx"
    assert listed["text_encoder"][0].sha256 == text.sha256


# --- the command line -----------------------------------------------------------------------------


def test_from_bundle_to_plans(bundle_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(bundle_copy), "--engine", "tensorrt-rtx", "--components", *QUICK]
    assert main([*arguments, "--batch", "2", "--size", "32", "64", "64"]) == 0
    said = capsys.readouterr()
    assert "tensorrt-rtx 1.7.1.116 for compute capability 8.0, 8.6, 8.9, 12.0, 12.1" in said.err
    assert "leaves 7.5 out" in said.err
    for line in ("text_encoder: parsing", "text_encoder: building", "guidance: building"):
        assert line in said.err
    head, text, guidance, total = said.out.splitlines()
    assert head.split() == ["component", "seconds", "MB", "kernels", "fused", "activation"]
    assert text.split()[-5:-3] == ["0", "of"]  # heads of 24 in FP32 have no kernel
    assert guidance.split()[4] == "-"
    assert [text.split()[0], guidance.split()[0]] == ["text_encoder", "guidance"]
    assert "s in all, peak memory" in total
    info = plan_info_from_file(bundle_copy / "guidance.plan.json")
    latents = next(t for t in info.inputs if t.spec.name == "latents")
    assert latents.profile == ((2, 4, 8, 8), (2, 4, 16, 16), (2, 4, 16, 16))

    assert main([*arguments, "--batch", "2", "--size", "32", "64", "64", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "tensorrt-rtx", "--compute-capability", "8.7"], "--engine tensorrt"),
        (["--engine", "tensorrt-rtx", "--workspace", "512"], "has no --workspace"),
        (["--engine", "tensorrt-rtx", "--strip-weights"], "has no --strip-weights"),
        (["--engine", "tensorrt-rtx", "--version-compatible"], "has no --version-compatible"),
        (["--engine", "tensorrt-rtx", "--hardware-compatible"], "--compute-capability"),
        (["--engine", "tensorrt-rtx", "--optimization-level", "7"], "expected 0 to 5"),
        (["--engine", "tensorrt-rtx", "--batch", "0"], "--batch | got 0"),
        (["--engine", "tensorrt-rtx", "--size", "64", "32", "64"], "--size | got 64 32 64"),
        (["--engine", "tensorrt-rtx", "--components", "vae"], "component | got 'vae'"),
        (["--engine", "tensorrt", "--compute-capability", "8.6"], "has no --compute-capability"),
        (["--engine", "trt"], "--engine | got 'trt' | expected one of tensorrt, tensorrt-rtx"),
        (["--engine", "tensorrt"], "needs the package tensorrt"),
        ([], "--engine"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    options: list[str], message: str, bundle_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(bundle_copy.parent)
    assert main([str(bundle_copy), *options]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert said.err.splitlines()[-1].startswith("error: ")
    assert sum(line.startswith("error") for line in said.err.splitlines()) == 1
    assert snapshot(bundle_copy.parent) == before


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    for command_line in (main, export_cli.main):
        with pytest.raises(SystemExit) as caught:
            command_line(["--help"])
        assert caught.value.code == 0
        text = capsys.readouterr().out
        for own in fields(PlanOptions):
            assert f"--{own.name.replace('_', '-')}" in text


def test_settings_come_from_options() -> None:
    assert build_settings(PlanOptions()) is None
    with pytest.raises(InputError, match="--optimization-level without --engine"):
        build_settings(PlanOptions(optimization_level=0))
    given = PlanOptions(engine="tensorrt", workspace=512, batch=(1, 2, 3))
    assert build_settings(given) == BuildSettings(
        engine="tensorrt", workspace=512 * 2**20, batch=Span(min=1, opt=2, max=3)
    )


def test_export_and_build_in_one(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "bundle"
    arguments = ["--model", str(checkpoint), "--output", str(output), "--width", "64"]
    arguments += ["--preset", "medium"]
    arguments += ["--height", "64", "--engine", "tensorrt-rtx", "--components", "guidance"]
    assert export_cli.main([*arguments, "--compute-capability", "8.7"]) == 2
    assert "compute capability 8.7" in capsys.readouterr().err
    assert not output.exists()  # refused before minutes of export

    assert export_cli.main([*arguments, "--compute-capability", "8.6", "--batch", "1"]) == 0
    assert "guidance" in capsys.readouterr().out
    assert tuple(plan_list(output, Bundle.open(output).sha256)) == ("guidance",)


def test_building_loads_no_torch(bundle_copy: Path) -> None:
    code = (
        "import sys\n"
        "from sld_edge.export.commands.build import main\n"
        "code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'onnx', 'safetensors'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "sys.exit(code)"
    )
    arguments = ["--engine", "tensorrt-rtx", "--components", "guidance", "--quiet"]
    paths = os.pathsep.join([str(ROOT / ".namespace"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code, str(bundle_copy), *arguments],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
