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
from sld_edge.engines.errors import (
    InputError,
    MissingPackageError,
    UserError,
    one_line,
    shortened,
)
from sld_edge.engines.onnxruntime.engine import PROVIDERS, onnxruntime
from sld_edge.engines.openvino.api import openvino
from sld_edge.engines.openvino.api import version as openvino_version
from sld_edge.engines.openvino.target import device_name, why_no_bf16
from sld_edge.engines.openvino.target import devices as openvino_devices
from sld_edge.engines.tensorrt.engine import tensorrt_module
from sld_edge.engines.tensorrt.plan_info import FLAVOURS, Flavour

# In order of preference; the CPU comes last.
NAMES: tuple[str, ...] = (
    *FLAVOURS,
    *(name for name in PROVIDERS if name != "cpu"),
    "openvino",
    "cpu",
)
ON_HOST = ("cpu", "openvino")  # these take and return arrays on the host

_WIDTH = 100  # columns of the table
_HOW_TO_GET: Mapping[str, str] = {
    "cpu": 'pip install "sld-edge[cpu]"',
    "openvino": 'pip install "sld-edge[openvino]"',
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
        reason: why not, and advice, separated by " | "; empty where it is usable.
        version: of its package; empty where the package does not load.
        devices: its devices; empty where it is not usable.
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
    """Check every provider, the best first; a failure becomes a `reason`, never an exception."""
    gpus = _gpus()
    return tuple(_status(name, lambda: gpus) for name in NAMES)


def status(name: str) -> ProviderStatus:
    """Check one provider.

    Raises:
        InputError: no provider of that name.
    """
    if name not in NAMES:
        raise InputError(
            "provider", got=repr(name), expected=f"one of auto, {', '.join(reversed(NAMES))}"
        )
    return _status(name, _gpus)


def choose(planned: Mapping[str, str | None]) -> tuple[str, str]:
    """Return the best provider for a bundle on this machine, and one short line that says why.

    Args:
        planned: for each TensorRT flavour None where the bundle's plans fit this machine, otherwise
            the reason why they do not.
    """
    obstacles: dict[str, str] = {}
    for flavour in FLAVOURS:
        obstacle = planned.get(flavour, "")
        if obstacle is None:
            checked = _status(flavour, _gpus)
            if checked.usable:
                return flavour, f"{flavour}: the plans of this bundle fit {_first_device(checked)}"
            obstacle = _short(checked)
        obstacles[flavour] = obstacle
    cuda = _status("cuda", _gpus)
    if cuda.usable:
        why = f"cuda: it works on {_first_device(cuda)}"
        return "cuda", why + _listed(obstacles, start="; ")
    return "cpu", "cpu" + _listed({**obstacles, "cuda": _short(cuda)}, start=": ")


def survey_table(statuses: Sequence[ProviderStatus]) -> str:
    """Write statuses as a table of plain text, 100 columns at most."""
    head = ("provider", "version", "works", "device, or why not and what to do")
    rows = [(each.name, each.version or "-", "yes" if each.usable else "no") for each in statuses]
    widths = [max(map(len, column)) for column in zip(head[:3], *rows, strict=True)]
    room = _WIDTH - sum(widths) - 2 * len(widths)
    lines = _lines_of_row(widths, head[:3], [head[3]])
    for each, row in zip(statuses, rows, strict=True):
        texts = each.devices if each.usable else each.reason.split(" | ")
        wrapped = [
            line
            for text in texts
            for line in textwrap.wrap(text, room, break_on_hyphens=False) or [""]
        ]
        lines += _lines_of_row(widths, row, wrapped)
    return "\n".join(lines)


def _status(name: str, gpus: Callable[[], _Gpus]) -> ProviderStatus:
    version = ""
    try:
        if name in FLAVOURS:
            version, reason, devices = _tensorrt(name, gpus)
        elif name == "openvino":
            version, reason, devices = _openvino()
        else:
            version, reason, devices = _onnxruntime(name, gpus)
    except Exception as error:  # one broken package must not hide the other providers
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
    gpu = gpus()
    return str(trt.__version__), gpu.reason or _refusal(trt, gpu.capability), gpu.devices


def _why_no_tensorrt(flavour: Flavour, error: Exception) -> str:
    module = flavour.replace("-", "_")
    cause = error.__cause__ or error
    if isinstance(cause, ModuleNotFoundError) and cause.name == module:
        try:  # a separate package holds the bindings and names the missing library
            importlib.import_module(f"{module}_bindings")
        except ModuleNotFoundError:
            python = ".".join(platform.python_version_tuple()[:2])
            return f"{module} is not installed for Python {python} | {_HOW_TO_GET[flavour]}"
        except Exception as broken:
            cause = broken
    return f"{module} is installed without its libraries: {_cause(cause)} | {_HOW_TO_GET[flavour]}"


def _refusal(trt: object, capability: str) -> str:
    """Return why TensorRT-RTX does not take a device, "" where it does; only it lists devices."""
    known = getattr(trt, "ComputeCapability", None)
    takes = [key[2:] for key in getattr(known, "__members__", ()) if key.startswith("SM")]
    if not takes or capability.replace(".", "") in takes:
        return ""
    names = ", ".join(f"{int(number) / 10:.1f}" for number in sorted(takes, key=int))
    return (
        f"the device has compute capability {capability}; TensorRT-RTX takes {names} | "
        "use tensorrt or cuda"
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
    gpu = gpus()
    return version, gpu.reason or _start(ort, PROVIDERS[name]), gpu.devices


def _openvino() -> tuple[str, str, tuple[str, ...]]:
    """Return version, reason and devices of OpenVINO."""
    try:
        openvino()
    except MissingPackageError:
        return "", f"openvino is not installed | {_HOW_TO_GET['openvino']}", ()
    missing = why_no_bf16()
    bf16 = "--cpu-precision bf16 works" if missing is None else f"no bf16: {missing}"
    names = {device: f"{device}: {device_name(device)}" for device in openvino_devices()}
    if "CPU" in names:
        names["CPU"] += f"; {bf16}"
    return openvino_version(), "", tuple(names.values())


def _start(ort: Any, provider: str) -> str:
    """Start a provider on a tiny graph; return why it did not start, "" where it did."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # the returned reason is enough for the user
    chain = [provider, PROVIDERS["cpu"]]
    try:
        session = ort.InferenceSession(_IDENTITY, options, providers=chain, enable_fallback=0)
    except Exception as error:  # ONNX Runtime's errors share no base class
        why = _cause(error)
    else:
        if provider in session.get_providers():
            return ""
        # ONNX Runtime went on without the provider, in silence.
        why = "a library of CUDA, cuDNN or TensorRT is missing or of another version"
    return f"{provider} does not start: {why} | see onnxruntime.ai/docs/execution-providers"


def _gpus() -> _Gpus:
    """Open and describe the first CUDA device; list the others, which are not used."""
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
    """List the devices that are not used, without opening them."""
    _, count = cuda.cudaGetDeviceCount()
    return tuple(f"not used: device {index}, see CUDA_VISIBLE_DEVICES" for index in range(1, count))


def _listed(reasons: Mapping[str, str], *, start: str) -> str:
    """List reasons by provider; a reason of several providers appears once, without a name."""
    texts = list(reasons.values())
    parts = dict.fromkeys(
        reason if texts.count(reason) > 1 else f"{name}: {reason}"
        for name, reason in reasons.items()
        if reason
    )
    return start + "; ".join(parts) if parts else ""


def _first_device(provider: ProviderStatus) -> str:
    return f"the {provider.devices[0].split(',')[0]} here"


def _short(provider: ProviderStatus) -> str:
    return provider.reason.split(" | ")[0]


def _line(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else _cause(error)


def _cause(error: BaseException) -> str:
    """Return an error's message as one short line; a missing library is named alone."""
    text = re.sub(r"^(\S+): cannot open shared object file.*", r"\1 is missing", one_line(error))
    return shortened(text, 160)


def _lines_of_row(widths: Sequence[int], cells: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Write one row, its last cell over several lines."""
    start = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    blank = " " * len(start)
    return [
        f"{start if index == 0 else blank}  {text}".rstrip() for index, text in enumerate(texts)
    ]
