"""Settings of a build: its options, which engine has which option, and the sizes of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from sld_edge.engines.base import TensorSpec
from sld_edge.engines.errors import InputError
from sld_edge.engines.tensorrt.plan_info import FLAVOURS, Flavour, Span

CELLS_STEP = 4  # latent cells; then the UNet's output for each branch starts on 256 bytes
BATCH = Span(min=1, opt=1, max=4)  # the default
_LEVELS = range(6)

# The options that an engine does not have, and what to do instead.
_LACKS: Mapping[Flavour, Mapping[str, str]] = {
    "tensorrt-rtx": {
        "version_compatible": "build with the version that will run the plan",
        "hardware_compatible": "name every kind of device with --compute-capability",
        "strip_weights": "TensorRT-RTX needs a GPU to build such plans; leave it out",
        "workspace": "TensorRT-RTX picks kernels when the plan runs; leave it out",
    },
    "tensorrt": {
        "compute_capabilities": "TensorRT builds for the device here; leave it out, or use "
        "--hardware-compatible for 8.0 and later",
    },
}


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """How to build plans.

    Attributes:
        engine: TensorRT's flavour.
        compute_capabilities: as "8.6" (RTX); empty: of the device here, or, without a device, all.
        batch: images in one call.
        concepts: the most safety concepts in one call; None: as many as the bundle has.
        size: width and height in pixels; None: only the bundle's size.
        components: names of the components to build; empty: all.
        workspace: bytes that kernels may use besides their tensors (classic).
        optimization_level: 0 for the fastest build to 5 for the fastest plan; None: the default.
        version_compatible: the plan runs on later versions too (classic).
        hardware_compatible: the plan runs on compute capability 8.0 and later (classic).
        strip_weights: the plan holds no weights; it loads them from the ONNX file (classic).
    """

    engine: Flavour
    compute_capabilities: tuple[str, ...] = ()
    batch: Span = BATCH
    concepts: int | None = None
    size: Span | None = None
    components: tuple[str, ...] = ()
    workspace: int | None = None
    optimization_level: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    strip_weights: bool = False

    def __post_init__(self) -> None:
        if self.engine not in FLAVOURS:
            raise InputError("engine", got=repr(self.engine), expected=" or ".join(FLAVOURS))
        for name, instead in _LACKS[self.engine].items():
            if getattr(self, name) != _DEFAULTS[name]:
                raise InputError(f"{self.engine} has no {option_name(name)}", do=instead)
        level = self.optimization_level
        if level is not None and level not in _LEVELS:
            raise InputError("optimization level", got=level, expected="0 to 5")
        if self.concepts is not None and self.concepts < 1:
            raise InputError("concepts", got=self.concepts, expected="1 or more")
        if self.workspace is not None and self.workspace < 1:
            raise InputError("workspace", got=self.workspace, expected="more than 0")

    def options(self) -> dict[str, Any]:
        """Return the options that change the plan, without its sizes and devices."""
        return {name: getattr(self, name) for name in _OPTIONS}


_OPTIONS = (
    "workspace",
    "optimization_level",
    "version_compatible",
    "hardware_compatible",
    "strip_weights",
)
_DEFAULTS = {field.name: field.default for field in fields(BuildSettings)}


def option_name(field: str) -> str:
    """Return the command line's name of a setting."""
    return {"compute_capabilities": "--compute-capability"}.get(
        field, f"--{field.replace('_', '-')}"
    )


def span_from_numbers(numbers: tuple[int, ...], *, what: str) -> Span:
    """Return the span of one number (a fixed size) or of three (least, best, most).

    Raises:
        InputError: another count of numbers, or numbers out of order.
    """
    try:
        least, best, most = numbers * 3 if len(numbers) == 1 else numbers
        return Span(min=least, opt=best, max=most)
    except ValueError as error:
        raise InputError(
            what,
            got=" ".join(map(str, numbers)) or "nothing",
            expected="one number, or MIN OPT MAX with 1 <= MIN <= OPT <= MAX",
        ) from error


def dimensions(
    settings: BuildSettings,
    *,
    width: int,
    height: int,
    downscale: int,
    text_length: int,
    concepts: int,
) -> dict[str, Span]:
    """Return the sizes of every dimension that a graph names.

    Args:
        settings: give batch and size.
        width: of the bundle's pictures, in pixels; used where the settings give no size.
        height: of the bundle's pictures, in pixels.
        downscale: pixels per latent cell in one direction.
        text_length: tokens of a prompt.
        concepts: number of safety concepts of the bundle.

    Raises:
        InputError: a size is not a multiple that the graphs and their buffers need.
    """
    pixels = {
        name: settings.size if settings.size is not None else fixed(side)
        for name, side in (("W", width), ("H", height))
    }
    step = CELLS_STEP * downscale
    for span in pixels.values():
        for size in (span.min, span.opt, span.max):
            if size % step:
                raise InputError(
                    "size",
                    got=f"{size} pixels",
                    expected=f"a multiple of {step}",
                    do="TensorRT needs aligned outputs; name another --size",
                )
    batch = settings.batch
    most = settings.concepts if settings.concepts is not None else concepts
    usual = min(concepts, most)
    return {
        "B": batch,
        # From the prompt's branch alone to prompt, empty prompt, and a branch for each concept.
        "K*B": Span(min=batch.min, opt=(2 + usual) * batch.opt, max=(2 + most) * batch.max),
        "n": Span(min=1, opt=usual, max=most),
        "N": fixed(1),  # texts are encoded one by one
        "L": fixed(text_length),
        **pixels,
        **{
            name.lower(): Span(
                min=span.min // downscale, opt=span.opt // downscale, max=span.max // downscale
            )
            for name, span in pixels.items()
        },
    }


def fixed(size: int) -> Span:
    """Return the span of one size alone."""
    return Span(min=size, opt=size, max=size)


def profile(
    spec: TensorSpec, sizes: Mapping[str, Span]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return an input's least, best and largest shape.

    Raises:
        InputError: a dimension that `sizes` does not have.
    """
    spans = []
    for size in spec.shape:
        if isinstance(size, int):
            spans.append(fixed(size))
        elif size in sizes:
            spans.append(sizes[size])
        else:
            raise InputError(f"input {spec.name}: dimension {size!r}", expected=", ".join(sizes))
    return (
        tuple(span.min for span in spans),
        tuple(span.opt for span in spans),
        tuple(span.max for span in spans),
    )
