"""The devices that plans can be built for here, found out before any work is done."""

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
    """What plans are built with and for.

    Attributes:
        trt: TensorRT's module.
        engine: its flavour.
        devices: names of those the build runs on; empty where it needs none.
        compute_capabilities: of the devices that the plans will run on.
        why: how these came about, for people.
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

    @property
    def reads_attention(self) -> bool:
        """Whether this TensorRT reads ONNX's Attention (opset 23): classic from 10.13 on."""
        major, minor = (int(part) for part in self.version.split(".")[:2])
        return self.engine == "tensorrt-rtx" or (major, minor) >= (10, 13)


def build_target(settings: BuildSettings, *, fp32: bool = False) -> Target:
    """Find out what can be built here, before any work is done.

    Args:
        settings: engine and options.
        fp32: whether a graph with FP32 matrix products is among those to build.

    Raises:
        MissingPackageError: no TensorRT of this flavour, or for the classic one no CUDA bindings.
        InputError: a compute capability that this version does not take.
        EngineError: TensorRT does not load, or the classic one finds no device.
    """
    trt = cast(TensorRTBuilder, tensorrt_module(settings.engine))
    if settings.engine == "tensorrt":
        return _target_here(trt, settings)
    taken = capabilities_taken(trt)
    asked, why = tuple(dict.fromkeys(settings.compute_capabilities)), "asked for"
    if not asked:
        own = _own_capability()
        if own is not None:
            asked, why = (own,), "the device here"
        else:
            asked = tuple(name for name in taken if not (fp32 and name == _NO_FP32))
            why = "no device here, so all that this version takes" + (
                f" in fp32, which leaves {_NO_FP32} out" if fp32 and _NO_FP32 in taken else ""
            )
    for name in asked:
        if name not in taken:
            raise refused(name, taken)
    if fp32 and _NO_FP32 in asked:
        raise InputError(
            f"compute capability {_NO_FP32}",
            got="a graph in fp32",
            expected=f"fp16, the only one that TensorRT-RTX multiplies in on {_NO_FP32}",
            do="export with --precision fp16, or leave it out",
        )
    return Target(
        trt=trt,
        engine=settings.engine,
        devices=(),
        compute_capabilities=tuple(sorted(asked, key=taken.index)),
        why=why,
    )


def capabilities_taken(trt: TensorRTBuilder) -> tuple[str, ...]:
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
    """Return what happened, without the advice that fits another place."""
    return ": ".join(part.removeprefix("got ") for part in str(error).split(" | ")[:2])


def _own_capability() -> str | None:
    try:
        device = Device()
    except UserError:  # no bindings, no driver or no device: all the same here
        return None
    capability = device.compute_capability
    device.close()
    return capability


def refused(name: str, taken: Sequence[str]) -> InputError:
    """Return the error about a compute capability that TensorRT-RTX does not take."""
    kind = "a Jetson" if name in _JETSONS else "a device of another kind"
    known = re.fullmatch(r"\d+\.\d", name) is not None
    return InputError(
        f"compute capability {name}",
        expected=f"one of {', '.join(taken)}",
        do=f"{kind} builds its plans itself, with --engine tensorrt" if known else None,
    )
