"""Settings of an evaluation, and sweeps of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from sld_edge.engines.errors import InputError
from sld_edge.engines.openvino.target import CpuPrecision
from sld_edge.runtime.pipeline import Pipeline
from sld_edge.runtime.safety import PRESETS, Safety, safety_from_preset
from sld_edge.runtime.scorers import Rule

Protocol = Literal["official", "per-prompt"]
Images = Literal["keep", "discard", "blur"]

OFFICIAL_STEPS, OFFICIAL_GUIDANCE_SCALE = 50, 7.5  # of I2P's protocol
MINIATURE_SCORERS = ("miniworld-examiner", "miniworld")
"""Judge the miniature's pictures; only the first one flags them."""
DEFAULT_SAFETY = ("off", "medium", "guard")
_SWEPT = {
    "scale": "scale",
    "threshold": "threshold",
    "warmup": "warmup_steps",
    "momentum": "momentum_scale",
    "beta": "momentum_beta",
}
_SWEEP_BASE = "medium"  # numbers that a sweep does not name; the method's own default
_MAX_SWEEP = 200


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One way to make every picture; `negative_prompt` gives the safety concepts as such."""

    name: str
    safety: str | Safety
    negative_prompt: bool = False

    @property
    def edits(self) -> bool:
        """Whether safety can edit a picture of this setting."""
        return (PRESETS[self.safety] if isinstance(self.safety, str) else self.safety).edits

    @property
    def filters(self) -> bool:
        """Whether a text filter takes words out of the prompts."""
        return (PRESETS[self.safety] if isinstance(self.safety, str) else self.safety).text_filter

    @property
    def uses_concept(self) -> bool:
        """Whether the pipeline takes a safety concept: every preset but off may use it."""
        return (PRESETS[self.safety] if isinstance(self.safety, str) else self.safety).acts


PLAIN = Setting(name="plain", safety="off")
NEGATIVE = Setting(name="negative prompt", safety="off", negative_prompt=True)


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """How all processes and machines of a run make and judge its pictures; see `EvalOptions`.

    Attributes:
        bundle: None is the embedded miniature.
        settings: the settings compared, plain first.
        rule: flags a picture by its scores.
        concepts: safety concepts, each with its own gate; empty: the bundle's.
        text_filter: words that settings with a text filter take out; empty: the concepts', or the
            bundle's.
        scorer_paths: the model's folder of a scorer, by name.
        guidance_scale: of all pictures; the protocol per-prompt prefers the list's.
        steps: None takes the bundle's.
        sampler: None takes the bundle's.
        first_seed: of the first prompt's pictures, if the list's seeds are not used.
        batch_size: None leaves it to the pipeline.
        device: of OpenVINO.
        cpu_precision: of OpenVINO on the CPU.
    """

    bundle: Path | None
    provider: str
    settings: tuple[Setting, ...]
    scorers: tuple[str, ...]
    rule: Rule
    concepts: tuple[str, ...] = ()
    text_filter: tuple[str, ...] = ()
    scorer_paths: Mapping[str, Path] = field(default_factory=dict)
    images_per_prompt: int = 10
    guidance_scale: float = OFFICIAL_GUIDANCE_SCALE
    steps: int | None = None
    sampler: str | None = None
    cache_interval: int = 1
    protocol: Protocol = "official"
    images: Images = "blur"
    first_seed: int = 500_000
    batch_size: int | None = None
    device: str = "CPU"
    cpu_precision: CpuPrecision = "fp32"


def loaded(settings: EvalSettings) -> Pipeline:
    """Load the pipeline of an evaluation."""
    return Pipeline.load(
        settings.bundle,
        provider=settings.provider,
        device=settings.device,
        cpu_precision=settings.cpu_precision,
        evaluation=True,
    )


def settings_from_names(names: Sequence[str]) -> tuple[Setting, ...]:
    """Return settings by name, plain first: every other setting is compared with it.

    Raises:
        InputError: neither a preset nor "negative".
    """
    known = {"off": PLAIN, "plain": PLAIN, "negative": NEGATIVE}
    known |= {name: Setting(name=name, safety=name) for name in PRESETS if name != "off"}
    for name in names:
        if name not in known:
            expected = f"one of {', '.join(PRESETS)}, negative"
            raise InputError("--safety", got=repr(name), expected=expected)
    return tuple(dict.fromkeys((PLAIN, *(known[name] for name in names))))


def sweep_settings(axes: Sequence[str], *, calls: int) -> tuple[Setting, ...]:
    """Return every combination of a sweep's numbers ("scale=500,2000", "threshold=0.01").

    Numbers that no axis names are those of the preset medium, for `calls` UNet calls.

    Raises:
        InputError: an unknown axis, one twice, no number, or numbers that safety refuses.
    """
    if not axes:
        return ()
    numbers: dict[str, tuple[float, ...]] = {}
    for axis in axes:
        name, sign, values = axis.partition("=")
        if name not in _SWEPT or not sign:
            expected = " ".join(f"{known}=A,B,…" for known in _SWEPT)
            raise InputError("--sweep", got=repr(axis), expected=expected)
        if name in numbers:
            raise InputError("--sweep", got=f"{name} twice", do="put its numbers in one list")
        numbers[name] = tuple(dict.fromkeys(_number(text, axis) for text in values.split(",")))
    count = math.prod(map(len, numbers.values()))
    if count > _MAX_SWEEP:
        raise InputError("--sweep", got=f"{count} settings", expected=f"at most {_MAX_SWEEP}")
    base = safety_from_preset(_SWEEP_BASE, calls=calls)
    settings = []
    for combination in itertools.product(*numbers.values()):
        given = dict(zip(numbers, combination, strict=True))
        name = ",".join(f"{axis}={value:g}" for axis, value in given.items())
        changed: dict[str, Any] = {
            _SWEPT[axis]: int(value) if axis == "warmup" and value.is_integer() else value
            for axis, value in given.items()
        }
        settings.append(Setting(name=name, safety=replace(base, **changed)))
    return tuple(settings)


def _number(text: str, axis: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError("--sweep", got=repr(axis), expected="numbers, separated by commas")
    return value
