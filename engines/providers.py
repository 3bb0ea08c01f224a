"""The providers: which of them work on this machine, why the others do not, and which is best."""

from __future__ import annotations

import importlib
import os
import platform
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sld_edge.engines.cuda.api import CudaRuntime
from sld_edge.engines.cuda.device import Device, cuda_runtime
from sld_edge.engines.errors import InputError, UserError
from sld_edge.engines.onnxruntime.engine import PROVIDERS, onnxruntime
from sld_edge.engines.tensorrt.engine import tensorrt_module
from sld_edge.engines.tensorrt.plan_info import FLAVOURS, Flavour

# In order of preference; the CPU is what always remains.
NAMES: tuple[str, ...] = (*FLAVOURS, *(name for name in PROVIDERS if name != "cpu"), "cpu")

_WIDTH = 100  # columns of the table
_HOW_TO_GET: Mapping[str, str] = {
    "cpu": 'pip install "sld-edge[cpu]"',
    "cuda": 'pip uninstall onnxruntime, then pip install "sld-edge[gpu]"',
    "ort-tensorrt": 'pip uninstall onnxruntime, then pip install "sld-edge[gpu]"',
    "ort-tensorrt-rtx": "pip uninstall onnxruntime, then pip install onnxruntime-trt-rtx",
    "tensorrt": "on a Jetson JetPack brings it (python -m venv --system-site-packages); "
    "elsewhere: pip install tensorrt",
    "tensorrt-rtx": 'pip install "sld-edge[rtx]"',
}
# An ONNX graph with one Identity node, y = x, float32 [1], opset 17: enough to start a provider.
_IDENTITY = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04'
    b"\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)


@dataclass(frozen=True, kw_only=True)
class ProviderStatus:
    """Whether a provider works on this machine.

    Attributes:
        name: one of `NAMES`.
        usable: whether it works.
        reason: why not, and what to do, parted by " | "; empty where it is usable.
        version: of its package; empty where that does not load.
        devices: what it would run on; empty where it is not usable.
    """

    name: str
    usable: bool
    reason: str
    version: str
    devices: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Gpus:
    """The CUDA devices, and the compute capability of the first; or why there is none."""

    devices: tuple[str, ...] = ()
    capability: str = ""
    reason: str = ""


def survey() -> tuple[ProviderStatus, ...]:
    """Look at every provider, the best first; what is broken is a reason, never an exception."""
    gpus = _gpus()
    return tuple(_status(name, lambda: gpus) for name in NAMES)


def status(name: str) -> ProviderStatus:
    """Look at one provider.

    Raises:
        InputError: no provider of that name.
    """
    if name not in NAMES:
        raise InputError(
            "provider", got=repr(name), expected=f"one of auto, {', '.join(reversed(NAMES))}"
        )
    return _status(name, _gpus)


def choose(planned: Mapping[str, str | None]) -> tuple[str, str]:
    """Return the best provider for a bundle on this machine, and why, in one short line.

    Args:
        planned: for each TensorRT flavour None where the bundle's plans fit this machine, otherwise
            why they do not.
    """
    against: dict[str, str] = {}
    for flavour in FLAVOURS:
        missing = planned.get(flavour, "")
        if missing is None:
            found = _status(flavour, _gpus)
            if found.usable:
                return flavour, f"{flavour}: the plans of this bundle fit {_first_name(found)}"
            missing = _short(found)
        against[flavour] = missing
    found = _status("cuda", _gpus)
    if found.usable:
        return "cuda", f"cuda: it works on {_first_name(found)}" + _against(against, start="; ")
    return "cpu", "cpu" + _against({**against, "cuda": _short(found)}, start=": ")


def survey_table(statuses: Sequence[ProviderStatus]) -> str:
    """Write statuses as a table of plain text, 100 columns at most."""
    head = ("provider", "version", "works", "on what, or why not and what to do")
    rows = [
        (found.name, found.version or "-", "yes" if found.usable else "no") for found in statuses
    ]
    widths = [max(map(len, column)) for column in zip(head[:3], *rows, strict=True)]
    room = _WIDTH - sum(widths) - 2 * len(widths)
    lines = _lines_of_row(widths, head[:3], [head[3]])
    for found, row in zip(statuses, rows, strict=True):
        texts = found.devices if found.usable else found.reason.split(" | ")
        wrapped = [line for text in texts for line in _wrap(text, room)]
        lines += _lines_of_row(widths, row, wrapped)
    return "\n".join(lines)


def _status(name: str, gpus: Callable[[], _Gpus]) -> ProviderStatus:
    version = ""
    try:
        version, reason, devices = (
            _tensorrt(name, gpus) if name in FLAVOURS else _onnxruntime(name, gpus)
        )
    except Exception as error:  # whatever a broken package does, the others are still looked at
        reason, devices = _line(error), ()
    return ProviderStatus(
        name=name,
        usable=not reason,
        reason=reason,
        version=version,
        devices=() if reason else devices,
    )


def _tensorrt(name: str, gpus: Callable[[], _Gpus]) -> tuple[str, str, tuple[str, ...]]:
    """Return version, reason and devices of a flavour of TensorRT."""
    flavour: Flavour = "tensorrt" if name == "tensorrt" else "tensorrt-rtx"
    try:
        trt = tensorrt_module(flavour)
    except Exception as error:
        return "", _why_no_tensorrt(flavour, error), ()
    found = gpus()
    return str(trt.__version__), found.reason or _refusal(trt, found.capability), found.devices


def _why_no_tensorrt(flavour: Flavour, error: Exception) -> str:
    module = flavour.replace("-", "_")
    cause = error.__cause__ or error
    if isinstance(cause, ModuleNotFoundError) and cause.name == module:
        try:  # the bindings are a package of their own, and say which library they miss
            importlib.import_module(f"{module}_bindings")
        except ModuleNotFoundError:
            return f"{module} is not installed for Python {_python()} | {_HOW_TO_GET[flavour]}"
        except Exception as broken:
            cause = broken
    return f"{module} is installed without its libraries: {_cause(cause)} | {_HOW_TO_GET[flavour]}"


def _refusal(trt: object, capability: str) -> str:
    """Say why a TensorRT does not take a device; only TensorRT-RTX has a list of what it takes."""
    known = getattr(trt, "ComputeCapability", None)
    takes = [key[2:] for key in getattr(known, "__members__", ()) if key.startswith("SM")]
    if not takes or capability.replace(".", "") in takes:
        return ""
    names = ", ".join(f"{int(number) / 10:.1f}" for number in sorted(takes, key=int))
    return (
        f"the device has compute capability {capability}; it takes {names} | use tensorrt or cuda"
    )


def _onnxruntime(name: str, gpus: Callable[[], _Gpus]) -> tuple[str, str, tuple[str, ...]]:
    """Return version, reason and devices of one of ONNX Runtime's execution providers."""
    try:
        ort = onnxruntime()
    except Exception as error:
        cause = error.__cause__ or error
        missing = isinstance(cause, ModuleNotFoundError)
        why = "is not installed" if missing else f"does not load: {_cause(cause)}"
        return "", f"onnxruntime {why} | {_HOW_TO_GET[name]}", ()
    version = str(ort.__version__)
    if name == "cpu":
        return version, "", (f"{platform.machine()}, {os.cpu_count()} threads",)
    if PROVIDERS[name] not in ort.get_available_providers():
        return version, f"not in the installed ONNX Runtime | {_HOW_TO_GET[name]}", ()
    found = gpus()
    return version, found.reason or _start(ort, PROVIDERS[name]), found.devices


def _start(ort: Any, provider: str) -> str:
    """Start a provider on the smallest graph; return why it did not start, "" where it did."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what is returned is all that the user needs to read
    chain = [provider, PROVIDERS["cpu"]]
    try:
        session = ort.InferenceSession(_IDENTITY, options, providers=chain, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's errors share no base class
        why = _cause(error)
    else:
        if provider in session.get_providers():
            return ""
        # ONNX Runtime has gone on without it in silence.
        why = "a library of CUDA, cuDNN or TensorRT is missing or of another version"
    return f"{provider} does not start: {why} | see onnxruntime.ai/docs/execution-providers"


def _gpus() -> _Gpus:
    """Open the first CUDA device and describe it; name the others."""
    try:
        cuda = cuda_runtime()
        device = Device()
        try:
            return _Gpus(
                devices=(_description(device), *_others(cuda)),
                capability=device.compute_capability,
            )
        finally:
            device.close()
    except Exception as error:
        return _Gpus(reason=_line(error))


def _description(device: Device) -> str:
    _, total = device.memory()
    shared = " shared with the CPU" if device.integrated else ""
    return (
        f"{device.name}, compute capability {device.compute_capability}, "
        f"driver for CUDA {device.driver}, {total / 2**30:.0f} GiB{shared}"
    )


def _others(cuda: CudaRuntime) -> tuple[str, ...]:
    """Name the devices that are not used, without waking them."""
    _, count = cuda.cudaGetDeviceCount()
    return tuple(f"not used: device {index}, see CUDA_VISIBLE_DEVICES" for index in range(1, count))


def _against(reasons: Mapping[str, str], *, start: str) -> str:
    """Tell what spoke against other providers; what several share is said once, of none."""
    told = list(reasons.values())
    parts = dict.fromkeys(
        reason if told.count(reason) > 1 else f"{name}: {reason}"
        for name, reason in reasons.items()
        if reason
    )
    return start + "; ".join(parts) if parts else ""


def _first_name(found: ProviderStatus) -> str:
    return f"the {found.devices[0].split(',')[0]} here"


def _short(found: ProviderStatus) -> str:
    return found.reason.split(" | ")[0]


def _line(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else _cause(error)


def _cause(error: BaseException) -> str:
    """An import's or a call's complaint, short."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"^(\S+): cannot open shared object file.*", r"\1 is missing", text)
    return text if len(text) <= 160 else text[:157] + "..."


def _python() -> str:
    return ".".join(platform.python_version_tuple()[:2])


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False) or [""]


def _lines_of_row(widths: Sequence[int], cells: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Write one row, its last cell over several lines."""
    start = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    blank = " " * len(start)
    return [
        f"{start if index == 0 else blank}  {text}".rstrip() for index, text in enumerate(texts)
    ]
