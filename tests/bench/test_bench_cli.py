"""`sld-bench` as a user types it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sld_edge.benchmarks.bench import comparison
from sld_edge.benchmarks.bench.cli import bench_settings, main, parser
from sld_edge.benchmarks.bench.comparison import difference
from sld_edge.benchmarks.bench.options import BenchOptions
from sld_edge.benchmarks.bench.peers import Installed
from sld_edge.runtime.commands.arguments import parsed

CHECKPOINT = Path(__file__).parents[2] / "benchmarks" / "miniworld" / "checkpoint"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run of the miniature: 2 steps, 2 rounds of 4 processes."""
    folder = tmp_path_factory.mktemp("bench") / "results"
    words = ["--steps", "2", "--rounds", "2", "--warmup", "0", "--safety", "max", "medium"]
    words += ["--batch", "1", "2", "--provider", "cpu", "--quiet"]
    assert main([*words, "--output", str(folder)]) == 0
    return folder


def tables(report: Path) -> Iterator[list[list[str]]]:
    """Each table of a Markdown report, its rows without the head."""
    for block in report.read_text(encoding="utf-8").split("\n\n"):
        if block.startswith("| "):
            yield [line.strip("| ").split(" | ") for line in block.split("\n")[2:]]


def quotients_agree(numerator: str, denominator: str, printed: str) -> bool:
    """Whether a printed ratio is the quotient of two printed numbers, up to their rounding."""
    value, low, high = (float(number) for number in re.findall(r"\d+\.\d+", printed))
    assert low <= value <= high
    return abs(float(numerator) / float(denominator) - value) <= 0.0005 + 0.0011 * value


def test_raw_samples_are_kept_and_the_medians_are_theirs(results: Path) -> None:
    found = json.loads((results / "results.json").read_text())
    assert (found["format"], found["kind"]) == ("sld-bench", "bundle")
    runs = found["runs"]
    assert [(run["round"], run["name"], run["batch"]) for run in runs] == [
        *((0, "off", 1), (0, "max", 1), (0, "medium", 1), (0, "medium", 2)),
        *((1, "max", 1), (1, "medium", 1), (1, "medium", 2), (1, "off", 1)),
    ]
    for run in runs:
        assert len(run["steps_s"]) == 2
        assert 0 < run["ready_s"] < run["first_image_s"]
        assert 0 < run["image_cpu_s"] < run["image_s"] * 2 * (os.cpu_count() or 1)
        assert sum(run["steps_s"]) + run["decode_s"] < run["image_s"]
        assert [phase["name"] for phase in run["phases"]] == ["start", "text", "denoise", "decode"]
        assert run["branches"] == ([2, 2] if run["name"] == "off" else [3, 3])
    own = [run for run in runs if (run["name"], run["batch"]) == ("medium", 1)]
    stages = found["figures"]["stages"]
    steps = [sample for run in own for sample in run["steps_s"]]
    assert stages["a step"]["p90"] == pytest.approx(np.percentile(steps, 90))
    assert stages["decode"]["median"] == pytest.approx(np.median([run["decode_s"] for run in own]))
    if sys.platform.startswith("linux"):
        for run in runs:
            peaks = [phase["peak"] for phase in run["phases"]]
            assert max(peaks) <= run["peak"] < max(peaks) + 16 * 2**20  # what answering takes
            assert 30e6 < run["anonymous"] < run["peak"] < 1e9
    assert found["first_start"]["ready_s"] > min(run["ready_s"] for run in own)
    assert not list(results.glob(".cache*"))


def test_printed_ratios_are_quotients_of_printed_medians(results: Path) -> None:
    price, _, _, batches, _ = tables(results / "report.md")
    assert [row[0] for row in price] == ["off", "max", "medium"]
    for row in price:
        assert quotients_agree(row[2], price[0][2], row[3])
        assert quotients_agree(row[4], price[0][4], row[5])
        assert row[7] == "-" or quotients_agree(row[7], price[0][7], row[8])
    for row in batches:
        assert float(row[2]) == pytest.approx(int(row[0]) / float(row[1]), rel=2e-3)
        alone = float(batches[0][1])
        assert quotients_agree(str(float(row[1]) / int(row[0])), str(alone), row[3])


def test_the_page_shows_charts_and_runs_nothing(results: Path) -> None:
    html = (results / "report.html").read_text(encoding="utf-8")
    assert html.count("<svg") >= 3
    assert "<script" not in html
    assert "The price of safety" in html


def test_results_are_not_written_over(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (results / "results.json").read_bytes()
    assert main(["--output", str(results)]) == 2
    assert "results.json exists | choose another name, or add --force" in only_line(capsys)
    assert (results / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "0"], "--rounds | got 0 | expected 1 or more"),
        (["--warmup", "-1"], "--warmup | got -1 | expected 0 or more"),
        (["--batch", "0"], "--batch | got 0 | expected 1 or more"),
        (["--safety", "mild"], "safety preset | got 'mild'"),
        (["--size", "7"], "width | got 7"),
        (["--steps", "0"], "steps | got 0"),
        (["nowhere"], "nowhere"),
        (["--provider", "npu"], "provider | got 'npu'"),
        (["--checkpoint", "sd15"], "--checkpoint is for --peers"),
        (["--peers"], "--peers needs the weights | add --checkpoint DIR"),
        (["--peers", "comfy", "--checkpoint", str(CHECKPOINT)], "peer | got 'comfy' | expected"),
        (["--peers", "--checkpoint", "nowhere"], "--checkpoint | got nowhere | expected a diff"),
        (["--peers", "sdcpp", "--checkpoint", str(CHECKPOINT)], "sdcpp is not measured: stable"),
        (
            ["--peers", "--checkpoint", str(CHECKPOINT), "--peer-python", "sdcpp"],
            "--peer-python | got 'sdcpp' | expected NAME=PATH",
        ),
        (
            ["--peers", "--checkpoint", str(CHECKPOINT), "--peer-python", "sdcpp=nowhere"],
            "--peer-python sdcpp | got nowhere",
        ),
        (
            ["--peers", "diffusers", "--checkpoint", str(CHECKPOINT), "--steps", "1"],
            "--steps | got",
        ),
        (["--peers", "--checkpoint", str(CHECKPOINT), "--provider", "cuda"], "got --provider cuda"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert message in only_line(capsys)
    assert not list(Path().iterdir())


def test_a_crashed_process_is_one_line_and_leaves_no_results(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sld_edge.benchmarks.bench.runs.OUR_WORKER", "sld_edge.no_such_worker")
    assert main(["--steps", "1", "--rounds", "1", "--quiet"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: safety guard, 1 at once: its process ended with exit code 1 |")
    assert not list(Path("sld-bench-results").iterdir())


def test_defaults_come_from_the_bundle_and_off_is_always_measured() -> None:
    options = parsed(parser(), BenchOptions, ["--safety", "max"])
    settings = bench_settings(options)
    assert (settings.size, settings.steps, settings.provider) == (64, 50, "cpu")
    assert settings.safety == ("off", "max")
    assert settings.reference == "max"


def test_it_needs_no_torch(tmp_path: Path) -> None:
    words = ["--steps", "1", "--rounds", "1", "--warmup", "0", "--batch", "1", "--safety", "off"]
    code = (
        "import sys; from sld_edge.benchmarks.bench.cli import main\n"
        f"assert main({[*words, '--quiet']}) == 0\n"
        "print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    heavy = {"torch", "diffusers", "transformers", "onnx", "matplotlib"}
    assert not set(done.stdout.splitlines()[-1].split()) & heavy


def test_beside_diffusers_on_the_same_weights() -> None:
    words = ["--peers", "diffusers", "--checkpoint", str(CHECKPOINT), "--size", "64"]
    words += ["--steps", "2", "--rounds", "1", "--warmup", "0", "--quiet", "--output", "out"]
    assert main([*words, "--provider", "cpu"]) == 0
    found = json.loads(Path("out/results.json").read_text())
    names = ["ours, strong", "ours, off", "diffusers, strong", "diffusers, off"]
    assert [run["name"] for run in found["runs"]] == names
    assert all(len(run["steps_s"]) == 1 for run in found["runs"])
    for name in ("diffusers, strong", "diffusers, off"):
        assert found["pictures"][name]["highest"] <= 1  # of 255: they are equals
    pictures = [Path("out/pictures") / f"{name.replace(', ', '-')}.png" for name in names]
    assert difference(pictures[0], pictures[1]).highest > 1  # safety acted
    strong, off, same, _ = tables(Path("out/report.md"))
    for row in (*strong, *off):
        assert quotients_agree(row[1], row[2], row[3])
    assert [row[0] for row in same] == names[2:]
    assert found["conditions"]["versions"]["diffusers"]


@pytest.mark.parametrize(
    ("peer", "bf16", "ours"),
    [
        ("diffusers", False, ["ours", "ours on openvino"]),
        ("diffusers-bf16", False, ["ours", "ours on openvino"]),
        ("diffusers", True, ["ours", "ours on openvino"]),
        ("diffusers-bf16", True, ["ours on openvino in bf16"]),
        ("openvino-default", True, ["ours on openvino in bf16"]),
    ],
)
def test_ours_is_measured_in_the_peers_kind_of_precision(
    peer: str, bf16: bool, ours: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(comparison, "why_no_bf16", lambda: None if bf16 else "no units")
    side = comparison.Contender(peer=Installed(name=peer, python="python"), safety="off")
    beside = comparison._ours_beside(side, BenchOptions())
    assert [each.who for each in beside] == ours
    asked = comparison._ours_beside(side, BenchOptions(provider="openvino"))
    assert [each.who for each in asked] == ["ours on openvino"]


def test_a_difference_of_pictures(tmp_path: Path) -> None:
    pixels = np.full((4, 4, 3), 100, np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    pixels[1, 2, 0] = 94
    Image.fromarray(pixels).save(tmp_path / "b.png")
    found: Any = difference(tmp_path / "a.png", tmp_path / "b.png")
    assert (found.highest, found.mean) == (6, 6 / 48)


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if not line.startswith("note: ")]
    (line,) = lines
    return line
