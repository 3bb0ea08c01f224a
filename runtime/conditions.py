"""Conditions of a measurement: machine, versions, power mode and load."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sld_edge.engines.providers import status
from sld_edge.runtime.report import versions

_BUSY = 0.25  # load a core at the start; above it the figures are doubtful
_ROOT = Path("/")


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
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "provider": provider,
        "devices": list(engine.devices),
        "cpu": cpu_name(_text("proc/cpuinfo")),
        "cores": cores,
        "threads": threads if threads is not None else cores,
        "memory": memory_total(_text("proc/meminfo")),
        "system": platform.platform(),
        "driver": _text("proc/driver/nvidia/version").partition("\n")[0] or None,
        "power_mode": power_mode(),
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
        "processor": f"{machine['cpu']}, {machine['cores']} cores",
        "threads": str(machine["threads"]),
        "memory": f"{memory / 2**30:.1f} GiB" if memory is not None else "",
        "system": machine["system"],
        "driver": machine["driver"] or "",
        "power mode": machine["power_mode"] or "",
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


def memory_total(meminfo: str) -> int | None:
    """Return the machine's memory in bytes, from /proc/meminfo."""
    match = re.search(r"^MemTotal:\s*(\d+) kB", meminfo, re.M)
    return int(match[1]) * 1024 if match is not None else None


def power_mode() -> str | None:
    """Return a Jetson's power mode, None elsewhere."""
    command = shutil.which("nvpmodel")
    if command is None:
        return None
    try:
        done = subprocess.run([command, "-q"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(r"NV Power Mode\s*:\s*(\S+)", done.stdout)
    return match[1] if match is not None else None


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
