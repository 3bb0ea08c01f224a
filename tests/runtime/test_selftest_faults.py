"""Faults of a device, planted into the stand-in: the self-test finds each, and says where it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import standin
from sld_edge.runtime.selftest import pictures, self_test, stability
from standin import faults
from standin.faults import quick

Plant = Callable[[pytest.MonkeyPatch], None]
Build = Callable[[Path, str], None]
IMAGE = "fp16 euler-a, safety medium"


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quick(monkeypatch)
    standin.install(monkeypatch)
    monkeypatch.setenv("SLD_EDGE_CACHE", str(tmp_path / "cache"))


def outcome(flavour: str = "tensorrt", build: Build = faults.build) -> tuple[list[str], list[str]]:
    """Return the names of the failed checks, and all lines."""
    lines: list[str] = []
    passed = self_test(flavour, say=lines.append, build=build)
    failed = [line.removeprefix("  FAIL  ") for line in lines if line.startswith("  FAIL")]
    failed = [line for line in failed if "without CUDA graphs, " not in line]
    assert passed == (not failed)
    return [line.split(": ")[0] for line in failed], lines


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_without_a_fault_everything_runs_and_passes(flavour: str) -> None:
    failed, lines = outcome(flavour)
    assert failed == []
    told = "\n".join(lines)
    for name in (stability.SAME_SEED, stability.BATCHES, stability.GRAPHS, stability.RESTART):
        assert f"  pass  fp16 {name}: " in told
    assert f"  pass  fp16 {stability.MEMORY}: each of " in told
    kept = "pass" if flavour == "tensorrt-rtx" else "none"
    assert f"  {kept}  fp16 {stability.KERNELS}: " in told
    assert "skipped" not in told


@pytest.mark.parametrize(
    ("plant", "first", "also"),
    [
        (faults.branches_exchanged, "fp16 unet", {IMAGE}),
        (faults.nan_in_a_prediction, None, {IMAGE, f"fp16 {stability.SAME_SEED}"}),
        (faults.nan_is_not_seen, "fp16 guidance", {"fp16 guidance, nan in noise_pred_text"}),
    ],
)
def test_a_wrong_component_is_named(
    plant: Plant, first: str | None, also: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    failed, lines = outcome()
    assert also <= set(failed)
    if first is not None:
        assert f"| the first wrong component: {first} |" in lines[-1]
    else:
        assert any("unet: NaN" in line or "NaN or infinity" in line for line in lines)


def test_a_plan_of_wrong_weights_is_named() -> None:
    failed, lines = outcome(build=faults.build_without_a_bias)
    assert failed[0] == "fp16 unet"
    assert "| the first wrong component: fp16 unet |" in lines[-1]


def test_a_drifting_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    faults.drifting_bit(monkeypatch)
    failed, _ = outcome()
    assert f"fp16 {stability.SAME_SEED}" in failed
    assert IMAGE not in failed  # it is too small for every tolerance


def test_a_graph_that_reads_old_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "STEPS", 8)  # a graph is replayed from the fifth call on
    faults.stale_graph(monkeypatch)
    failed, lines = outcome()
    assert {IMAGE, f"fp16 {stability.GRAPHS}"} <= set(failed)
    assert not any(name.startswith(("fp16 unet", "fp16 guidance")) for name in failed)
    assert "finding: fp16 pictures pass with --no-cuda-graph" in lines
    assert any("the first difference is at UNet call" in line for line in lines)
    assert "try --no-cuda-graph" in lines[-1]


@pytest.mark.parametrize(
    "plant", [faults.old_workspace, faults.stage_of_freed_memory, faults.endless_memory]
)
def test_a_full_memory_that_breaks_later_pictures(
    plant: Plant, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    failed, _ = outcome()
    assert failed[0] == f"fp16 {stability.MEMORY}"  # unloading may fail after it


def test_kernels_that_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sld_edge.engines.tensorrt.engine._JitCache.save", lambda self: None)
    assert outcome("tensorrt-rtx")[0] == [f"fp16 {stability.KERNELS}"]
