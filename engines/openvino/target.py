"""Where OpenVINO runs a graph: its devices, and the processor's BF16 units."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sld_edge.engines.errors import InputError
from sld_edge.engines.openvino.api import core
from sld_edge.engines.settings import thread_count

CpuPrecision = Literal["fp32", "bf16"]
DEVICES = ("CPU", "GPU", "NPU", "AUTO")
_HINTS: Mapping[CpuPrecision, str] = {"fp32": "f32", "bf16": "bf16"}
_CPUINFO = Path("/proc/cpuinfo")
# Names in /proc/cpuinfo. AVX-512 without them would compute BF16 with FP32 units, and be slower.
_BF16_UNITS = {"amx_bf16", "avx512_bf16", "avx_ne_convert", "bf16"}


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where and how graphs run.

    Attributes:
        device: a device that OpenVINO lists, like "CPU" or "GPU.0".
        precision: of the arithmetic on the CPU; another device computes in its own default, which
            is FP16.
    """

    device: str = "CPU"
    precision: CpuPrecision = "fp32"

    def settings(self) -> dict[str, Any]:
        """Return the settings of a compiled graph."""
        if self.device != "CPU":
            return {"PERFORMANCE_HINT": "LATENCY"}
        return {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": thread_count() or os.cpu_count() or 1,
            # Two processes would be bound to the same cores.
            "ENABLE_CPU_PINNING": False,
            # Without a hint OpenVINO takes BF16 wherever the processor has it.
            "INFERENCE_PRECISION_HINT": _HINTS[self.precision],
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }

    def __str__(self) -> str:
        """Return a text that is the same only for targets that compute the same."""
        return f"{self.device} {self.precision}" if self.device == "CPU" else self.device


def target(device: str, precision: CpuPrecision) -> Target:
    """Choose a device of OpenVINO and check that it computes in a precision.

    Args:
        device: "CPU", "GPU", "NPU", a numbered device like "GPU.1", or "AUTO": a GPU if there is
            one, else the CPU.
        precision: of the arithmetic on the CPU.

    Raises:
        InputError: OpenVINO has no such device here, or the device does not compute like that.
        MissingPackageError: OpenVINO is not installed.
    """
    if precision not in _HINTS:
        raise InputError("--cpu-precision", got=precision, expected=f"one of {', '.join(_HINTS)}")
    there = devices()
    chosen = device
    if device == "AUTO":
        chosen = next((each for each in there if each.startswith("GPU")), "CPU")
    elif device not in there:
        chosen = next((each for each in there if each.partition(".")[0] == device), "")
    if not chosen:
        raise InputError("--device", got=device, expected=f"one of {', '.join((*there, 'AUTO'))}")
    if precision == "bf16":
        why = "only the CPU takes it" if chosen != "CPU" else why_no_bf16()
        if why is not None:
            raise InputError(
                f"--cpu-precision bf16 on {chosen}", got=why, do="leave --cpu-precision out"
            )
    return Target(device=chosen, precision=precision)


def devices() -> tuple[str, ...]:
    """Return the devices that OpenVINO lists here, like "CPU" and "GPU.0"."""
    return tuple(core().available_devices)


def device_name(device: str) -> str:
    """Return the name that a device's maker gave it."""
    return str(core().get_property(device, "FULL_DEVICE_NAME"))


def why_no_bf16() -> str | None:
    """Return why this processor does not compute in BF16; None where it does."""
    units = _units()
    if units is not None and not units:
        return f"this processor has no BF16 units ({', '.join(sorted(_BF16_UNITS))})"
    if "BF16" not in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        return "OpenVINO lists no BF16 for this processor"
    return None


def _units() -> set[str] | None:
    """Return the processor's BF16 units; None where the system does not tell."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.M)
    return None if flags is None else _BF16_UNITS & set(flags[1].split())
