"""The devices that plans can be built for on this machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from sld_edge.engines.cuda.device import Device
from sld_edge.engines.errors import EngineError, InputError, MissingPackageError, UserError
from sld_edge.engines.tensorrt.build_settings import BuildSettings
from sld_edge.engines.tensorrt.builder_api import TensorRTBuilder
from sld_edge.engines.tensorrt.engine import tensorrt_module
from sld_edge.engines.tensorrt.plan_info import Flavour

_JETSONS = ("5.3", "6.2", "7.2", "8.7", "11.0")
_NO_FP32 = "7.5"  # TensorRT-RTX has no FP32 matrix product for Turing


@dataclass(frozen=True, kw_only=True)
class Target:
    """The TensorRT and the devices of a build.

    Attributes:
        trt: TensorRT's module.
        engine: its flavour.
        devices: names of the devices that the build needs; empty where it needs none.
        compute_capabilities: of the devices that the plans will run on.
        why: the reason for this choice, for people.
    """

    trt: TensorRTBuilder
    engine: Flavour
    devices: tuple[str, ...]
    compute_capabilities: tuple[str, ...]
    why: str

    @property
    def version(self) -> str:
        """TensorRT's version."""
        return self.trt.__version__

    @property
    def name(self) -> str:
        """Flavour and version, for people."""
        return f"{self.engine} {self.version}"


def build_target(settings: BuildSettings, *, fp32: bool = False) -> Target:
    """Choose what to build for on this machine, before any work is done.

    Args:
        settings: engine and options.
        fp32: whether one of the graphs has FP32 matrix products.

    Raises:
        MissingPackageError: no TensorRT of this flavour, or no CUDA bindings for classic TensorRT.
        InputError: a compute capability that this version does not support.
        EngineError: TensorRT does not load, or classic TensorRT finds no device.
    """
    trt = cast(TensorRTBuilder, tensorrt_module(settings.engine))
    if settings.engine == "tensorrt":
        return _target_here(trt, settings)
    supported = supported_capabilities(trt)
    chosen, why = tuple(dict.fromkeys(settings.compute_capabilities)), "asked for"
    if not chosen:
        here = _capability_here()
        if here is not None:
            chosen, why = (here,), "the device here"
        else:
            chosen = tuple(name for name in supported if not (fp32 and name == _NO_FP32))
            why = "no device here, so all that this version takes" + (
                f" in fp32, which leaves {_NO_FP32} out" if fp32 and _NO_FP32 in supported else ""
            )
    for name in chosen:
        if name not in supported:
            raise unsupported_capability(name, supported)
    if fp32 and _NO_FP32 in chosen:
        raise InputError(
            f"compute capability {_NO_FP32}",
            got="a graph in fp32",
            expected=f"fp16; on {_NO_FP32} TensorRT-RTX multiplies in no other precision",
            do=f"export with --precision fp16, or leave {_NO_FP32} out",
        )
    return Target(
        trt=trt,
        engine=settings.engine,
        devices=(),
        compute_capabilities=tuple(sorted(chosen, key=supported.index)),
        why=why,
    )


def supported_capabilities(trt: TensorRTBuilder) -> tuple[str, ...]:
    """Return the compute capabilities that a TensorRT-RTX builds for, "8.6", in order."""
    members = trt.ComputeCapability.__members__
    numbers = sorted(int(name[2:]) for name in members if re.fullmatch(r"SM\d+", name))
    return tuple(f"{number // 10}.{number % 10}" for number in numbers)


def _target_here(trt: TensorRTBuilder, settings: BuildSettings) -> Target:
    try:
        device = Device()
    except MissingPackageError:
        raise
    except EngineError as error:
        raise EngineError(
            "classic TensorRT builds only on a device like the one that runs the plan",
            got=reason_of(error),
            do="build there, or with --engine tensorrt-rtx for an RTX card",
        ) from error
    try:
        if device.integrated and settings.hardware_compatible:
            raise InputError(
                f"{device.name} has no --hardware-compatible, as no Jetson has", do="leave it out"
            )
        return Target(
            trt=trt,
            engine="tensorrt",
            devices=(device.name,),
            compute_capabilities=(device.compute_capability,),
            why=device.name,
        )
    finally:
        device.close()


def reason_of(error: UserError) -> str:
    """Return an error's first two parts, without its advice."""
    return ": ".join(part.removeprefix("got ") for part in str(error).split(" | ")[:2])


def _capability_here() -> str | None:
    try:
        device = Device()
    except UserError:  # no bindings, no driver or no device
        return None
    capability = device.compute_capability
    device.close()
    return capability


def unsupported_capability(name: str, supported: Sequence[str]) -> InputError:
    """Return the error for a compute capability that TensorRT-RTX does not support."""
    kind = "a Jetson" if name in _JETSONS else "a device of another kind"
    known = re.fullmatch(r"\d+\.\d", name) is not None
    return InputError(
        f"compute capability {name}",
        expected=f"one of {', '.join(supported)}",
        do=f"{kind} builds its plans itself, with --engine tensorrt" if known else None,
    )
