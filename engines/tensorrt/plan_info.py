"""The description of a plan, in the `.json` file beside it, and whether this machine can run it.

A plan is code for one TensorRT, one operating system and some devices. TensorRT's errors about a
wrong plan do not name these. So sld-edge compares them before TensorRT reads the plan.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

from sld_edge.engines.base import TensorSpec
from sld_edge.engines.checks import exact_text, finite_number, whole_number
from sld_edge.engines.errors import EngineError, InputError, one_line
from sld_edge.engines.files import json_from_bytes, read_limited
from sld_edge.engines.tensorrt.build_log import PlanContents

FORMAT = "sld-edge-plan"
FORMAT_VERSION = 2
_LIMIT = 1 << 20  # bytes of a description
_MOST = 1 << 50  # the largest number in a description

Flavour = Literal["tensorrt", "tensorrt-rtx"]
FLAVOURS: tuple[Flavour, ...] = ("tensorrt-rtx", "tensorrt")


@dataclass(frozen=True, kw_only=True)
class Span:
    """The sizes that a plan takes in one dimension: least, best, most."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise ValueError(f"{self.min} {self.opt} {self.max} is not min <= opt <= max")

    def __contains__(self, size: object) -> bool:
        return isinstance(size, int) and self.min <= size <= self.max


@dataclass(frozen=True, kw_only=True)
class PlanTensor:
    """One input or output; `profile` holds an input's least, best and largest shape."""

    spec: TensorSpec
    profile: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None = None


@dataclass(frozen=True, kw_only=True)
class PlanInfo:
    """The description of a plan.

    Attributes:
        component: the name of the bundle's component.
        sha256: of the plan.
        bytes: size of the plan.
        source_sha256: of the ONNX graph and its weights (see `source_digest`).
        engine: TensorRT's flavour.
        engine_version: the version that built it.
        system: operating system and architecture, "linux x86_64".
        devices: names of the devices that built it; empty where it was built without a device.
        compute_capabilities: of the devices that it runs on.
        precision: arithmetic, "fp16" or "fp32".
        inputs: with their profiles.
        outputs: as the network definition has them.
        options: of the build, as far as they change the plan.
        contents: kernels, attentions and memory, where the builder's log has them.
        seconds: the time of the build.
        created_by: "sld-edge" and its version.
    """

    component: str
    sha256: str
    bytes: int
    source_sha256: str
    engine: Flavour
    engine_version: str
    system: str
    devices: tuple[str, ...]
    compute_capabilities: tuple[str, ...]
    precision: str
    inputs: tuple[PlanTensor, ...]
    outputs: tuple[PlanTensor, ...]
    options: Mapping[str, Any]
    seconds: float
    created_by: str
    contents: PlanContents | None = None

    def to_json(self) -> str:
        """Write as `NAME.plan.json`."""
        body = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(body, indent=1) + "\n"


def info_path(plan: Path) -> Path:
    """Return the path of a plan's description."""
    return plan.with_name(plan.name + ".json")


def plan_info_from_file(path: Path) -> PlanInfo:
    """Read `NAME.plan.json`; see `description_of` and `plan_info_from_bytes`."""
    return plan_info_from_bytes(description_of(path), origin=path)


def description_of(path: Path) -> bytes:
    """Return the bytes of `NAME.plan.json`.

    Raises:
        EngineError: no such file, or a file that cannot be read.
    """
    if not path.exists():
        raise EngineError(
            f"no description of the plan at {path}",
            do="build the plan with sld-build, which writes it",
        )
    return read_limited(path, _LIMIT, error=EngineError, do="build the plan again")


def plan_info_from_bytes(data: bytes, *, origin: Path) -> PlanInfo:
    """Read the bytes of `NAME.plan.json`; `origin` is the path that error messages name.

    Raises:
        EngineError: not a plan's description, or of a newer format.
    """
    body = json_from_bytes(data, origin=str(origin), error=EngineError, do="build the plan again")
    if body.get("format") != FORMAT:
        raise EngineError(f"{origin} is not a plan's description", do="build the plan again")
    if body.get("format_version") != FORMAT_VERSION:
        raise EngineError(
            f"{origin}: format version",
            got=body.get("format_version"),
            expected=FORMAT_VERSION,
            do="update sld-edge, or build the plan again",
        )
    try:
        return _info(body)
    except (KeyError, TypeError, ValueError, AttributeError, InputError) as error:
        raise EngineError(
            f"{origin} lacks an entry or has a wrong one",
            got=one_line(error),
            do="build the plan again",
        ) from error


def named_shape(
    name: str, shape: Sequence[int], described: Sequence[PlanTensor]
) -> tuple[int | str, ...]:
    """Return a tensor's shape with the names of its run-time dimensions, "?" where unknown.

    TensorRT keeps no names of an output's dimensions, so they come from the description.
    """
    names = next((tensor.spec.shape for tensor in described if tensor.spec.name == name), ())
    return tuple(
        size if size >= 0 else (names[axis] if axis < len(names) else "?")
        for axis, size in enumerate(shape)
    )


def this_system() -> str:
    """Return the operating system and architecture, in the form of `PlanInfo.system`."""
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    return f"{platform.system().lower()} {machine}"


def misfit(info: PlanInfo, *, version: str, compute_capability: str, system: str) -> str | None:
    """Return why a plan cannot run here, "built for ... | here ..."; None where it can.

    Args:
        info: the plan.
        version: of the installed TensorRT, of the plan's flavour.
        compute_capability: of the device, "8.6".
        system: as from `this_system`.
    """
    if info.system != system:
        return f"it was built for {info.system} | here is {system}"
    if not _version_fits(info, version):
        return f"it was built with {info.engine} {info.engine_version} | here is {version}"
    if not _device_fits(info, compute_capability):
        built = ", ".join(info.compute_capabilities)
        return f"it was built for compute capability {built} | the device here has " + (
            compute_capability
        )
    return None


def _version_fits(info: PlanInfo, version: str) -> bool:
    if info.engine == "tensorrt" and info.options.get("version_compatible"):
        # The plan contains its own runtime: later versions run it (TensorRT's support matrix).
        return _numbers(version) >= _numbers(info.engine_version)
    return _numbers(version)[:3] == _numbers(info.engine_version)[:3]


def _device_fits(info: PlanInfo, capability: str) -> bool:
    if info.options.get("hardware_compatible"):  # Ampere and later
        return _numbers(capability) >= (8, 0)
    return capability in info.compute_capabilities


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


def _info(body: Mapping[str, Any]) -> PlanInfo:
    if body["engine"] not in FLAVOURS:
        raise ValueError(f"engine {body['engine']!r}")
    return PlanInfo(
        component=exact_text("component", body["component"]),
        sha256=exact_text("sha256", body["sha256"]),
        bytes=whole_number("bytes", body["bytes"], 0, _MOST),
        source_sha256=exact_text("source_sha256", body["source_sha256"]),
        engine=cast(Flavour, body["engine"]),
        engine_version=exact_text("engine_version", body["engine_version"]),
        system=exact_text("system", body["system"]),
        devices=_texts("devices", body["devices"]),
        compute_capabilities=_texts("compute_capabilities", body["compute_capabilities"]),
        precision=exact_text("precision", body["precision"]),
        inputs=tuple(map(_tensor, body["inputs"])),
        outputs=tuple(map(_tensor, body["outputs"])),
        options=_options(body["options"]),
        seconds=finite_number("seconds", body["seconds"], 0, 1e9),
        created_by=exact_text("created_by", body["created_by"]),
        contents=_contents(body["contents"]),
    )


def _contents(body: Mapping[str, Any] | None) -> PlanContents | None:
    if body is None:
        return None
    names = (field.name for field in fields(PlanContents))
    return PlanContents(**{name: whole_number(name, body[name], 0, _MOST) for name in names})


def _texts(name: str, body: object) -> tuple[str, ...]:
    if not isinstance(body, list) or len(body) > 64:
        raise ValueError(f"{name} is no list of texts")
    return tuple(exact_text(name, text) for text in body)


def _options(body: object) -> dict[str, Any]:
    """Read the options of a build: names with a number, a text or a flag."""
    if not isinstance(body, dict) or len(body) > 64:
        raise ValueError("options are no object")
    if not all(isinstance(value, str | int | float | None) for value in body.values()):
        raise ValueError("an option that is no number, text or flag")
    return dict(body)


def _tensor(body: Mapping[str, Any]) -> PlanTensor:
    spec, profile = body["spec"], body["profile"]
    if profile is not None and any(len(shape) != len(spec["shape"]) for shape in profile):
        raise ValueError("a profile of another rank than its tensor")
    return PlanTensor(
        spec=TensorSpec(
            name=exact_text("tensor", spec["name"]),
            dtype=_dtype(spec["dtype"]),
            shape=_shape(spec["shape"]),
        ),
        profile=None if profile is None else _profile(profile),
    )


def _profile(
    body: Sequence[Sequence[int]],
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    least, best, most = (
        tuple(whole_number("profile", size, 1, _MOST) for size in shape) for shape in body
    )
    if not all(low <= mid <= high for low, mid, high in zip(least, best, most, strict=True)):
        raise ValueError("a profile that is not least <= best <= most")
    return least, best, most


def _dtype(body: object) -> str:
    if body not in ("float32", "float16", "float64", "int64", "int32", "uint8", "bool"):
        raise ValueError("a tensor's dtype")
    return str(body)


def _shape(body: Sequence[Any]) -> tuple[int | str, ...]:
    if not isinstance(body, list) or len(body) > 8:
        raise ValueError("a tensor's shape")
    return tuple(
        size if isinstance(size, str) else whole_number("shape", size, 0, _MOST) for size in body
    )
