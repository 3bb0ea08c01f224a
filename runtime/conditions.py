"""Conditions of a measurement: machine, versions, power mode and load."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sld_edge.engines.providers import status
from sld_edge.runtime.report import versions

_BUSY = 0.25  # load a core at the start; above it the figures are doubtful
_ROOT = Path("/")
_CLOCKS = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,pstate"  # of nvidia-smi
_KINDS = {  # by a flag in /proc/cpuinfo, the fastest first
    "amx_bf16": "AMX",
    "avx512_bf16": "AVX-512 with BF16",
    "avx512f": "AVX-512",
    "avx2": "AVX2",
    "bf16": "ARM with BF16",
    "asimd": "ARM",
}
_FREQUENCIES = ("cur", "min", "max")


def conditions(provider: str, *, threads: int | None) -> dict[str, Any]:
    """Return the conditions of a measurement with a provider, ready for JSON.

    `threads` are those of the CPU engines; None leaves them the choice, one a core.
    """
    engine = status(provider)
    packages = dict(versions())
    if engine.version and provider not in ("cpu", "cuda"):
        packages[provider] = engine.version
    cores = os.cpu_count() or 1
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "provider": provider,
        "devices": list(engine.devices),
        "cpu": cpu_name(_text("proc/cpuinfo")),
        "cpu_kind": cpu_kind(_text("proc/cpuinfo")),
        "cores": cores,
        "threads": threads if threads is not None else cores,
        "memory": memory_total(_text("proc/meminfo")),
        "system": platform.platform(),
        "driver": _text("proc/driver/nvidia/version").partition("\n")[0] or None,
        "power_mode": power_mode(),
        "clocks": clocks(),
        "release": _text("etc/nv_tegra_release").partition("\n")[0] or None,
        "governor": _text("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip() or None,
        "load_average": _load(),
        "versions": packages,
    }


def busy(machine: Mapping[str, Any]) -> str | None:
    """Return a warning where the machine had other work at the start."""
    load, cores = machine["load_average"], machine["cores"]
    if load is None or load <= _BUSY * cores:
        return None
    return (
        f"the machine is busy: load average {load:.1f} on {cores} cores; "
        "trust the ratios, not the seconds"
    )


def condition_lines(machine: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """Return the known conditions as names and texts."""
    memory, load = machine["memory"], machine["load_average"]
    lines = {
        "date": machine["date"],
        "provider": machine["provider"],
        "device": "; ".join(machine["devices"]),
        "processor": f"{machine['cpu']}, {machine['cpu_kind']}, {machine['cores']} cores",
        "threads": str(machine["threads"]),
        "memory": f"{memory / 2**30:.1f} GiB" if memory is not None else "",
        "system": machine["system"],
        "driver": machine["driver"] or "",
        "power mode": machine["power_mode"] or "",
        "clocks": machine["clocks"] or "",
        "Jetson Linux": machine["release"] or "",
        "CPU governor": machine["governor"] or "",
        "load average at the start": f"{load:.2f}" if load is not None else "",
        "versions": ", ".join(f"{name} {value}" for name, value in machine["versions"].items()),
    }
    return [(name, text) for name, text in lines.items() if text]


def cpu_name(cpuinfo: str) -> str:
    """Return the processor's name from /proc/cpuinfo, with the family numbers of x86."""
    fields = dict(re.findall(r"^(model name|Model|cpu family|model)\s*:\s*(.+)$", cpuinfo, re.M))
    name = fields.get("model name") or fields.get("Model") or platform.processor()
    if "cpu family" in fields and "model" in fields:
        return f"{name}, family {fields['cpu family']}, model {fields['model']}"
    return name or platform.machine()


def cpu_kind(cpuinfo: str) -> str:
    """Return the kind of a processor, on which ratios of programs depend: "AVX2", "AMX" and so on.

    Args:
        cpuinfo: the text of /proc/cpuinfo.
    """
    match = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.M)
    flags = set(match[1].split()) if match is not None else set()
    for flag, kind in _KINDS.items():
        if flag in flags:
            return kind
    return platform.machine()


def memory_total(meminfo: str) -> int | None:
    """Return the machine's memory in bytes, from /proc/meminfo."""
    match = re.search(r"^MemTotal:\s*(\d+) kB", meminfo, re.M)
    return int(match[1]) * 1024 if match is not None else None


def power_mode() -> str | None:
    """Return a Jetson's power mode, None elsewhere."""
    match = re.search(r"NV Power Mode\s*:\s*(\S+)", _answer("nvpmodel", "-q"))
    return match[1] if match is not None else None


def clocks() -> str | None:
    """Return the GPU's clocks, by nvidia-smi or a Jetson's /sys; None where nothing says them."""
    asked = _answer("nvidia-smi", f"--query-gpu={_CLOCKS}", "--format=csv,noheader")
    if asked.strip():
        return f"{_CLOCKS}: {asked.splitlines()[0].strip()}"
    for folder in sorted((_ROOT / "sys/class/devfreq").glob("*")):
        if re.search(r"gpu|ga10b|gv11b|gb10b", folder.name):
            hertz = [_text(f"sys/class/devfreq/{folder.name}/{part}_freq") for part in _FREQUENCIES]
            if all(text.strip().isdecimal() for text in hertz):
                now, least, most = (int(text) / 1e6 for text in hertz)
                return f"GPU {now:.0f} MHz, {least:.0f} to {most:.0f}"
    return None


def _answer(program: str, *options: str) -> str:
    """Return the output of a program; empty where it is missing or fails."""
    command = shutil.which(program)
    if command is None:
        return ""
    try:
        done = subprocess.run([command, *options], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except (OSError, AttributeError):  # Windows
        return None


def _text(path: str) -> str:
    try:
        return (_ROOT / path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
