"""A stand-in for classic TensorRT's builder: it checks its calls and writes down what they said.

Graphs are read with onnx. The "plan" is a JSON text of all that was asked for. It refuses what the
real one refuses: opsets of later versions, sizes that are missing or do not fit, unknown flags.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

_NUMPY = {1: "float32", 2: "uint8", 6: "int32", 7: "int64", 9: "bool", 10: "float16"}


class BuilderFlag(enum.Enum):
    TF32 = 7
    VERSION_COMPATIBLE = 12
    STRIP_PLAN = 17
    REFIT_IDENTICAL = 18
    STRICT_NANS = 21


class PreviewFeature(enum.Enum):
    RUNTIME_ACTIVATION_RESIZE_10_10 = 1


class ProfilingVerbosity(enum.Enum):
    DETAILED = 1


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class HardwareCompatibilityLevel(enum.Enum):
    NONE = 0
    AMPERE_PLUS = 1


class StronglyTyped(enum.IntEnum):
    STRONGLY_TYPED = 1


class Nothing(enum.IntEnum):
    """TensorRT 11's flags, as far as they matter here."""


class Severity:
    INTERNAL_ERROR, ERROR, WARNING = 0, 1, 2


class ILogger(Severity):
    def log(self, level: int, message: str) -> None: ...


class IProgressMonitor:
    pass


@dataclass
class Tensor:
    name: str
    dtype: int
    shape: tuple[int, ...]


@dataclass
class Network:
    flags: int
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    opset: int = 0

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    def get_input(self, index: int) -> Tensor:
        return self.inputs[index]

    def get_output(self, index: int) -> Tensor:
        return self.outputs[index]


@dataclass
class TimingCache:
    content: bytes

    def serialize(self) -> bytes:
        return self.content


@dataclass
class Profile:
    shapes: dict[str, tuple[Sequence[int], Sequence[int], Sequence[int]]] = field(
        default_factory=dict
    )

    def set_shape(
        self, name: str, least: Sequence[int], best: Sequence[int], most: Sequence[int]
    ) -> None:
        if not all(a <= b <= c for a, b, c in zip(least, best, most, strict=True)):
            raise ValueError(f"{name}: {least} {best} {most}")
        self.shapes[name] = (least, best, most)


class Config:
    def __init__(self, owner: FakeTensorRT) -> None:
        self.owner = owner
        self.flags = {BuilderFlag.TF32}
        self.pools: dict[str, int] = {}
        self.profiles: list[Profile] = []
        self.builder_optimization_level = 3
        self.hardware_compatibility_level = HardwareCompatibilityLevel.NONE
        self.profiling_verbosity: Any = None
        self.progress_monitor: Any = None
        self.features: list[str] = []
        self.cache: TimingCache | None = None

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.add(BuilderFlag(flag))

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(BuilderFlag(flag))

    def set_preview_feature(self, feature: PreviewFeature, enable: bool) -> None:
        assert enable
        self.features.append(PreviewFeature(feature).name)

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        self.pools[MemoryPoolType(pool).name] = size

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, content: bytes) -> TimingCache | None:
        mark = self.owner.mark
        return TimingCache(content) if content in (b"", mark) or mark in content else None

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.owner.caches.append(cache.content)
        self.cache = cache
        return True

    def get_timing_cache(self) -> TimingCache | None:
        return self.cache


class Builder:
    def __init__(self, owner: FakeTensorRT, logger: ILogger) -> None:
        self.owner, self.logger = owner, logger

    def create_network(self, flags: int) -> Network:
        return Network(flags)

    def create_builder_config(self) -> Config:
        return Config(self.owner)

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        (profile,) = config.profiles
        for line in self.owner.complaints:
            self.logger.log(ILogger.ERROR, line)
        if self.owner.complaints:
            return None
        if not self.owner.always_typed:
            assert network.flags == 1 << StronglyTyped.STRONGLY_TYPED
        if BuilderFlag.STRIP_PLAN in config.flags:
            assert BuilderFlag.REFIT_IDENTICAL in config.flags
        for tensor in network.inputs:
            least, _, most = profile.shapes[tensor.name]
            for size, low, high in zip(tensor.shape, least, most, strict=True):
                assert size in (-1, low)
                assert size == -1 or low == high
        if config.cache is not None and not config.cache.content:
            config.cache.content = self.owner.mark + b": measured"
        said = {
            "flags": sorted(flag.name for flag in config.flags),
            "features": config.features,
            "pools": config.pools,
            "level": config.builder_optimization_level,
            "hardware": config.hardware_compatibility_level.name,
            "opset": network.opset,
            "profile": profile.shapes,
        }
        return json.dumps(said).encode()


@dataclass
class ParserError:
    text: str

    def desc(self) -> str:
        return self.text

    def node_name(self) -> str:
        return "first"

    def node_operator(self) -> str:
        return "Attention"


class OnnxParser:
    def __init__(self, owner: FakeTensorRT, network: Network) -> None:
        self.owner, self.network = owner, network
        self.errors: list[ParserError] = []

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, index: int) -> ParserError:
        return self.errors[index]

    def parse_from_file(self, path: str) -> bool:
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    assert (Path(path).parent / entry.value).is_file()
        opset = model.opset_import[0].version
        if opset > self.owner.newest_opset:
            self.errors.append(ParserError(f"opset {opset} is too new"))
            return False
        self.network.opset = opset
        self.network.inputs = [_tensor(value) for value in model.graph.input]
        self.network.outputs = [_tensor(value) for value in model.graph.output]
        return True


class FakeTensorRT:
    """What `import tensorrt` gives; `complaints` makes every build fail with these log lines."""

    ILogger, IProgressMonitor = ILogger, IProgressMonitor
    BuilderFlag, MemoryPoolType = BuilderFlag, MemoryPoolType
    HardwareCompatibilityLevel = HardwareCompatibilityLevel
    PreviewFeature, ProfilingVerbosity = PreviewFeature, ProfilingVerbosity

    def __init__(self, version: str = "10.3.0", *, newest_opset: int = 21) -> None:
        self.__version__ = version
        self.newest_opset = newest_opset
        self.always_typed = version.startswith("11.")
        self.NetworkDefinitionCreationFlag = Nothing if self.always_typed else StronglyTyped
        self.complaints: list[str] = []
        self.caches: list[bytes] = []  # those it was given
        self.mark = version.encode()

    def Builder(self, logger: Any) -> Any:  # noqa: N802  # TensorRT's name
        return Builder(self, logger)

    def OnnxParser(self, network: Network, logger: Any) -> Any:  # noqa: N802
        return OnnxParser(self, network)

    def nptype(self, dtype: int) -> type:
        return np.dtype(_NUMPY[dtype]).type


@dataclass
class FakeDevice:
    """A device for the classic flavour, which builds for where it runs."""

    name: str = "Orin"
    compute_capability: str = "8.7"
    integrated: bool = True

    def close(self) -> None:
        pass


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
    return Tensor(value.name, kind.elem_type, shape)
