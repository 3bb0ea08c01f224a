"""The certificate of a device: it passes what is right, finds faults, and tells nothing private."""

from __future__ import annotations

import getpass
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import standin
from sld_edge.engines.errors import InputError
from sld_edge.runtime.bundle import EMBEDDED
from sld_edge.runtime.commands.run import main
from sld_edge.runtime.selftest import endurance, stability
from sld_edge.runtime.selftest.certificate_file import (
    certificate_from_json,
    certificate_json,
    verdict_of,
)
from sld_edge.runtime.selftest.miniature import unpack
from standin import faults

PICTURES = 24
FLAT = f"{PICTURES} {endurance.FLAT}"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    faults.quick(monkeypatch)
    monkeypatch.setattr(endurance, "PICTURES", PICTURES)


@pytest.fixture
def report(tmp_path: Path) -> Path:
    return tmp_path / "device.json"


@pytest.fixture
def flavour() -> str:
    return "tensorrt"


@pytest.fixture
def planned(flavour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The FP16 miniature with plans for the stand-in, in a folder with a telling name."""
    standin.install(monkeypatch)
    bundle = tmp_path / "ann lee" / "sd15"
    bundle.parent.mkdir()
    unpack("fp16", bundle)
    faults.build(bundle, flavour)
    return bundle


def certified(bundle: Path, report: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Certify; return the exit code and the certificate, read strictly."""
    code = main(["--certify", str(bundle), "--report", str(report), *options])
    return code, certificate_from_json(report.read_bytes(), origin=report.name)


def names(certificate: dict[str, Any], outcome: str) -> set[str]:
    return {c["name"] for c in certificate["checks"] if c["outcome"] == outcome}


def test_a_processor_passes(report: Path) -> None:
    code, told = certified(EMBEDDED, report, "--provider", "cpu")
    assert (code, told["verdict"]) == (0, "pass")
    assert {stability.SAME_SEED, stability.BATCHES, stability.RESTART, FLAT} <= names(told, "pass")
    assert {stability.GRAPHS, stability.MEMORY} <= names(told, "not applicable")
    assert {"unet: noise_pred", "golden picture, euler-a, safety max"} <= names(told, "pass")
    assert told["device"] is None
    warm = told["latency_s"]["warm"]
    assert warm["picture"]["count"] == PICTURES - 3
    for times in warm.values():
        assert 0 < times["p50"] <= times["p95"]
    cold = told["latency_s"]["cold"]
    assert cold["load"] > 0
    assert cold["picture"] == pytest.approx(cold["text"] + cold["UNet call"] + cold["decode"], 0.5)
    assert told["memory"]["process"]["peak"] >= told["memory"]["process"]["end"] > 0
    assert told["memory"]["computed"]["components"]["unet"]["weights"] > 8e6


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_a_device_passes(planned: Path, report: Path, flavour: str) -> None:
    code, told = certified(planned, report)  # auto takes the plans' flavour
    assert (code, told["verdict"]) == (0, "pass")
    assert told["settings"]["provider"] == flavour
    assert (stability.KERNELS in names(told, "pass")) == (flavour == "tensorrt-rtx")
    assert {stability.GRAPHS, stability.MEMORY, stability.RESTART} <= names(told, "pass")
    assert told["device"]["name"] == "Stand-in GPU"
    assert (
        told["bundle"]["components"]["unet"]["runs_on"] == f"{flavour} fp16, attention decomposed"
    )
    assert len(told["bundle"]["components"]["unet"]["plan_sha256"]) == 64
    memory = told["memory"]["device"]
    assert memory["before"] < memory["peak"] < memory["total"]


def test_nothing_private_is_told(planned: Path, report: Path) -> None:
    def break_it(path: Path) -> None:
        path.write_bytes(b"x" + path.read_bytes()[1:])

    break_it(planned / "text_encoder.onnx")  # its path is in the error
    code, told = certified(planned, report, "--provider", "tensorrt")
    assert code == 1
    assert any("text_encoder.onnx is not the file" in c["text"] for c in told["checks"])
    text = report.read_text()
    for private in ("ann lee", str(planned), str(Path.home()), socket.gethostname()):
        assert private not in text
    assert f"/{getpass.getuser()}" not in text


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (lambda patch: faults.leak(patch, 2 << 20), FLAT),
        (faults.drifting_bit, stability.SAME_SEED),
        (faults.nan_in_a_prediction, "unet: noise_pred"),
    ],
)
def test_faults_are_found(
    plant: Callable[[pytest.MonkeyPatch], None],
    found: str,
    planned: Path,
    report: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    code, told = certified(planned, report, "--provider", "tensorrt")
    assert (code, told["verdict"]) == (1, "fail")
    assert found in names(told, "fail")


def test_a_wrong_plan_is_found(planned: Path, report: Path) -> None:
    faults.build_without_a_bias(planned, "tensorrt")
    code, told = certified(planned, report, "--provider", "tensorrt")
    assert (code, told["verdict"]) == (1, "fail")
    assert "unet: noise_pred" in names(told, "fail")
    assert "vae_decoder: images" in names(told, "pass")


def test_what_was_skipped_does_not_pass(planned: Path, report: Path) -> None:
    code, told = certified(planned, report, "--provider", "tensorrt", "--minutes", "0.000001")
    assert (code, told["verdict"]) == (1, "incomplete")
    assert not names(told, "pass")
    assert {FLAT, "warm latency", stability.SAME_SEED, "unet"} <= names(told, "skipped")
    assert "golden picture, ddim, safety medium" in names(told, "skipped")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "--certify writes a file | add --report device.json"),
        (("a prompt", "--report", "{report}"), "makes its own pictures"),
        (("--report", "{report}", "--minutes", "0"), "--minutes | got 0.0"),
        (("--report", "{report}", "--minutes", "nan"), "--minutes | got nan"),
        (("--report", "{report}", "--provider", "tpu"), "expected one of auto, cpu"),
        (("--report", "{exists}"), "exists"),
        (("--report", "{report}", "--no-cuda-graph"), "sets this itself | got --no-cuda-graph"),
        (("--report", "{report}", "--steps", "50"), "sets this itself | got --steps"),
    ],
)
def test_wrong_options(
    options: tuple[str, ...],
    said: str,
    report: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "exists.json").write_text("{}")
    words = [word.format(report=report, exists=tmp_path / "exists.json") for word in options]
    assert main(["--certify", str(EMBEDDED), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not report.exists()


def test_minutes_without_a_certificate(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["a red star", "--minutes", "3"]) == 2
    assert "--minutes is the time for --certify" in capsys.readouterr().err


def test_no_bundle(report: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--certify", str(tmp_path / "none"), "--report", str(report)]) == 2
    assert "no bundle at" in capsys.readouterr().err
    assert not report.exists()


def small(**changes: Any) -> dict[str, Any]:
    check = {"name": "a", "outcome": "pass", "text": "fine", "numbers": {}}
    body: dict[str, Any] = {
        "format": "sld-edge-device",
        "format_version": 1,
        "verdict": "pass",
        "device": None,
        **{name: {} for name in ("conditions", "bundle", "settings", "latency_s", "memory")},
        "checks": [check],
        "seconds": 3.5,
    }
    return {**body, **changes}


def test_a_certificate_is_read_as_it_was_written() -> None:
    assert certificate_from_json(certificate_json(small()), origin="x.json") == small()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"verdict": "incomplete"}, "verdict | got incomplete | expected pass"),
        ({"more": 1}, "entries"),
        ({"format_version": 2}, "sld-edge-device 2"),
        ({"seconds": "3"}, "seconds"),
        ({"checks": [{"name": "a"}]}, "a check: entries"),
        ({"checks": [{"name": "a", "outcome": "ok", "text": "", "numbers": {}}]}, "got ok"),
        ({"checks": []}, "expected incomplete"),
        ({"conditions": {"where": "/home/ann/sd15"}}, "names a folder"),
    ],
)
def test_a_certificate_that_was_changed(changes: dict[str, Any], said: str) -> None:
    data = json.dumps(small(**changes)).encode()
    with pytest.raises(InputError, match=said.replace("|", r"\|")):
        certificate_from_json(data, origin="x.json")


def test_paths_and_numbers_that_json_has_not() -> None:
    told = {
        "a": "cannot read /home/ann/my models/sd15/unet.plan: no file",
        "b": r"C:\Users\ann\sd15\unet.plan is missing",
        "c": [float("nan"), 1.5, "1.5 s a picture, 3/4 of them"],
    }
    data = json.loads(certificate_json(told, private=[Path("/home/ann/my models")]))
    assert data == {
        "a": "cannot read my models/sd15/unet.plan: no file",
        "b": "unet.plan is missing",
        "c": ["nan", 1.5, "1.5 s a picture, 3/4 of them"],
    }


def test_verdicts() -> None:
    assert verdict_of(["pass", "not applicable"]) == "pass"
    assert verdict_of(["pass", "skipped"]) == "incomplete"
    assert verdict_of(["not applicable"]) == "incomplete"
    assert verdict_of(["skipped", "fail"]) == "fail"


def test_a_short_use_by_another_program_is_no_growth() -> None:
    steady = [100] * 40
    assert endurance.growth(steady) == 0
    assert endurance.growth([*steady[:30], 900, *steady[31:]]) == 0
    assert endurance.growth([100 + 2 * k for k in range(40)]) == 2 * 27


def test_percentiles() -> None:
    samples = list(np.linspace(0, 1, 101))
    assert endurance.percentiles(samples) == {"count": 101, "p50": 0.5, "p95": 0.95}


def test_the_collected_certificates_are_whole() -> None:
    """Every file in docs/devices is a certificate, and docs/devices.md names it."""
    folder = Path(__file__).parents[2] / "docs"
    text = (folder / "devices.md").read_text(encoding="utf-8")
    files = sorted((folder / "devices").glob("*.json"))
    for file in files:
        certificate_from_json(file.read_bytes(), origin=file.name)
        assert f"devices/{file.name}" in text
    assert bool(files) != ("No device has been certified yet" in text)
