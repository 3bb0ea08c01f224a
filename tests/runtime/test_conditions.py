"""What a measurement says of the machine, from recorded text."""

from __future__ import annotations

import platform
import stat
from pathlib import Path

import pytest

from sld_edge.runtime import conditions as module
from sld_edge.runtime.conditions import (
    busy,
    clocks,
    condition_lines,
    conditions,
    cpu_kind,
    cpu_name,
    memory_total,
    power_mode,
)

X86 = "processor\t: 0\ncpu family\t: 23\nmodel\t\t: 49\nmodel name\t: EPYC\nstepping\t: 0\n"
JETSON = "processor\t: 0\nmodel name\t: ARMv8 Processor rev 1 (v8l)\nBogoMIPS\t: 62.50\n"
PI = "processor\t: 0\nBogoMIPS\t: 108.00\n\nModel\t\t: Raspberry Pi 5 Model B Rev 1.0\n"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (X86, "EPYC, family 23, model 49"),
        (JETSON, "ARMv8 Processor rev 1 (v8l)"),
        (PI, "Raspberry Pi 5 Model B Rev 1.0"),
    ],
)
def test_processors_by_name(text: str, name: str) -> None:
    assert cpu_name(text) == name


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        ("flags\t\t: fpu sse4_2 avx2 fma", "AVX2"),
        ("flags\t\t: avx2 avx512f avx512_vnni", "AVX-512"),
        ("flags\t\t: avx2 avx512f avx512_bf16", "AVX-512 with BF16"),
        ("flags\t\t: avx2 avx512f avx512_bf16 amx_bf16 amx_tile", "AMX"),
        ("Features\t: fp asimd evtstrm", "ARM"),
        ("Features\t: fp asimd bf16", "ARM with BF16"),
        ("flags\t\t: fpu avx2x", platform.machine()),
        ("", platform.machine()),
    ],
)
def test_kinds_of_processors(flags: str, kind: str) -> None:
    assert cpu_kind(f"processor\t: 0\n{flags}\n") == kind


def test_memory_of_the_machine() -> None:
    assert memory_total("MemTotal:       24613888 kB\nMemFree: 1 kB\n") == 24613888 * 1024
    assert memory_total("") is None


def test_a_jetsons_power_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert power_mode() is None
    command = tmp_path / "nvpmodel"
    command.write_text("#!/bin/sh\n[ \"$1\" = -q ] && printf 'NV Power Mode: MAXN_SUPER\\n2\\n'\n")
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    assert power_mode() == "MAXN_SUPER"


def test_governor_and_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil\n",
        "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX 580.65\nGCC version: 13\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(module, "_ROOT", tmp_path)
    told = conditions("cpu", threads=3)
    assert (told["governor"], told["threads"]) == ("schedutil", 3)
    assert told["driver"] == "NVRM version: NVIDIA UNIX 580.65"
    names = dict(condition_lines(told))
    assert names["CPU governor"] == "schedutil"
    assert "power mode" not in names
    assert "onnxruntime" in names["versions"]


@pytest.mark.parametrize(("load", "warned"), [(None, False), (0.4, False), (1.9, True)])
def test_a_busy_machine_is_told(load: float | None, warned: bool) -> None:
    warning = busy({"load_average": load, "cores": 2})
    assert (warning is not None) == warned


def test_the_clocks_of_a_jetson_and_of_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(module, "_ROOT", tmp_path)
    assert clocks() is None
    folder = tmp_path / "sys/class/devfreq/17000000.gpu"
    folder.mkdir(parents=True)
    for part, hertz in (("cur", 624750000), ("min", 306000000), ("max", 1020000000)):
        (folder / f"{part}_freq").write_text(f"{hertz}\n")
    assert clocks() == "GPU 625 MHz, 306 to 1020"
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho '2520 MHz, 3105 MHz, 10501 MHz, 450.00 W, P0'\n")
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    told = clocks()
    assert told is not None
    assert told.endswith("pstate: 2520 MHz, 3105 MHz, 10501 MHz, 450.00 W, P0")
