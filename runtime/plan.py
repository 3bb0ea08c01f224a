"""From what a caller asked for to what will be done: defaults resolved, every number checked."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, get_args

from sld_edge.engines.errors import InputError
from sld_edge.runtime.bundle import KEPT_SAFETY, SHALLOW, Manifest
from sld_edge.runtime.random import MAX_SEED, Rng
from sld_edge.runtime.safety import Safety, safety_from_preset
from sld_edge.runtime.samplers import SamplerTable, sampler_table

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a caller asks for; None takes the bundle's default.

    A sequence where one value would do gives each prompt its own; but a tuple of safety concepts
    is several at once, for every prompt. Every prompt makes `count` images, with seeds `seed`,
    `seed + 1`, …
    """

    prompts: tuple[str, ...]
    negative_prompt: str | Sequence[str] | None = None
    safety: str | Safety | Sequence[str | Safety] | None = None
    safety_concept: str | tuple[str, ...] | Sequence[str | tuple[str, ...]] | None = None
    safety_numbers: Mapping[str, Any] = field(default_factory=dict)  # replace the preset's
    steps: int | None = None
    guidance_scale: float | Sequence[float] | None = None
    sampler: str | None = None
    eta: float = 0.0
    seed: int | Sequence[int] = 0
    rng: Rng = "torch"
    count: int = 1
    width: int | None = None
    height: int | None = None
    cache_interval: int = 1
    safety_interval: int = 1


@dataclass(frozen=True, kw_only=True)
class ImagePlan:
    """One image: everything that is its own within a batch; `concepts` are all different."""

    prompt: str
    negative_prompt: str
    seed: int
    guidance_scale: float
    preset: str
    safety: Safety
    concepts: tuple[str, ...]

    @property
    def acting_concepts(self) -> tuple[str, ...]:
        """The concepts, and none where safety is off."""
        return self.concepts if self.safety.acts else ()


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run: its images, and what they share."""

    images: tuple[ImagePlan, ...]
    table: SamplerTable
    steps: int
    eta: float
    rng: Rng
    width: int
    height: int
    cache_interval: int
    safety_interval: int


def plan_from_request(request: Request, manifest: Manifest) -> RunPlan:
    """Resolve a request against a bundle.

    Raises:
        InputError: a setting that cannot be honoured, named with what would be.
    """
    defaults = manifest.defaults
    steps = request.steps if request.steps is not None else defaults.steps
    if not isinstance(steps, int) or not 1 <= steps <= 1000:
        raise InputError("steps", got=steps, expected="a whole number from 1 to 1000")
    if not isinstance(request.count, int) or request.count < 1:
        raise InputError("count", got=request.count, expected="a whole number, 1 or more")
    if request.rng not in get_args(Rng):
        raise InputError("rng", got=repr(request.rng), expected="one of torch, philox")
    sampler = request.sampler if request.sampler is not None else defaults.sampler
    scheduler = {**manifest.scheduler, "prediction_type": manifest.prediction_type}
    table = sampler_table(sampler, scheduler, steps, eta=request.eta)
    width, height = _size(request, manifest)
    prompts = len(request.prompts)
    if not prompts:
        raise InputError("no prompt given")
    negative = _each("negative_prompt", request.negative_prompt, prompts, "")
    preset: str | Safety = defaults.safety
    safety = _each("safety", request.safety, prompts, preset)
    concept = _concepts(request.safety_concept, prompts)
    scale = _each("guidance_scale", request.guidance_scale, prompts, defaults.guidance_scale)
    seeds = _each("seed", request.seed, prompts, 0)
    images: list[ImagePlan] = []
    for index, prompt in enumerate(request.prompts):
        name, numbers = _safety(safety[index], concept[index], request.safety_numbers, table.calls)
        first = ImagePlan(
            prompt=_text("prompt", prompt),
            negative_prompt=_text("negative prompt", negative[index]),
            seed=_seed(seeds[index]),
            guidance_scale=_guidance_scale(scale[index]),
            preset=name,
            safety=numbers,
            concepts=_different(numbers.concept, manifest.safety_concepts),
        )
        seed_range = range(first.seed, first.seed + request.count)
        images.extend(replace(first, seed=seed % (MAX_SEED + 1)) for seed in seed_range)
    return RunPlan(
        images=tuple(images),
        table=table,
        steps=steps,
        eta=request.eta,
        rng=request.rng,
        width=width,
        height=height,
        cache_interval=_interval("cache", request.cache_interval, SHALLOW, steps, manifest),
        safety_interval=_interval("safety", request.safety_interval, KEPT_SAFETY, steps, manifest),
    )


def _each(name: str, value: T | Sequence[T] | None, count: int, default: T) -> Sequence[T]:
    """One value a prompt, from one value for all or a sequence with one each."""
    if value is None:
        return [default] * count
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise InputError(
            name, got=f"{len(value)} values", expected=f"one, or {count}: one a prompt"
        )
    return value


def _concepts(
    value: str | tuple[str, ...] | Sequence[str | tuple[str, ...]] | None, prompts: int
) -> Sequence[str | tuple[str, ...] | None]:
    """One text, or a tuple of several, a prompt; None is the bundle's own."""
    if isinstance(value, tuple):
        return [value] * prompts
    own: str | tuple[str, ...] | None = None
    return _each("safety_concept", value, prompts, own)


def _different(
    concept: str | tuple[str, ...] | None, otherwise: tuple[str, ...]
) -> tuple[str, ...]:
    """Drop repeated concepts: they would cost a branch each and change nothing."""
    if concept is None:
        return otherwise
    return (concept,) if isinstance(concept, str) else tuple(dict.fromkeys(concept))


def _safety(
    value: str | Safety,
    concept: str | tuple[str, ...] | None,
    changed: Mapping[str, Any],
    calls: int,
) -> tuple[str, Safety]:
    if isinstance(value, Safety):
        preset, numbers = "custom", value
    elif isinstance(value, str):
        preset, numbers = value, safety_from_preset(value, calls=calls)
    else:
        raise InputError("safety", got=repr(value), expected="a preset's name or a Safety")
    if changed:
        preset, numbers = "custom", replace(numbers, **dict(changed))
    if concept is not None:
        if not numbers.acts:
            raise InputError(
                "a safety concept does nothing with safety off", do="choose a preset, or drop it"
            )
        numbers = replace(numbers, concept=concept)
    for text in (numbers.concept,) if isinstance(numbers.concept, str) else numbers.concept or ():
        _text("safety concept", text)
    return preset, numbers


def _text(name: str, value: str) -> str:
    if not isinstance(value, str):
        raise InputError(name, got=type(value).__name__, expected="text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{name} is not valid Unicode text", got=error.reason) from error
    return value


def _seed(value: int) -> int:
    if not isinstance(value, int) or not 0 <= value <= MAX_SEED:
        raise InputError("seed", got=value, expected=f"a whole number from 0 to {MAX_SEED}")
    return value


def _guidance_scale(value: float) -> float:
    if not math.isfinite(value) or value < 0:
        raise InputError("guidance scale", got=value, expected="a finite number, 0 or more")
    return float(value)


def _interval(name: str, value: int, component: str, steps: int, manifest: Manifest) -> int:
    """Check an interval of UNet calls; all but 1 need a component that older bundles lack."""
    if not isinstance(value, int) or not 1 <= value <= steps:
        raise InputError(
            f"{name} interval",
            got=value,
            expected=f"a whole number from 1, which is off, to the {steps} steps",
        )
    if value > 1 and component not in manifest.components:
        raise InputError(
            f"{name} interval {value} with a bundle that has no {component}",
            do="export it again (by the builder: --via torch makes no unet_shallow), or drop it",
        )
    return value


def _size(request: Request, manifest: Manifest) -> tuple[int, int]:
    width = request.width if request.width is not None else manifest.size.width
    height = request.height if request.height is not None else manifest.size.height
    factor = manifest.latents.downscale
    for name, value in (("width", width), ("height", height)):
        if not isinstance(value, int) or value < factor or value % factor:
            raise InputError(
                name, got=value, expected=f"a multiple of {factor} pixels, {factor} or more"
            )
    needed = _memory_needed(width, height, factor)
    available = _memory_available()
    if needed > available:
        raise InputError(
            f"an image of {width}x{height} pixels is out of this machine's memory",
            got=f"about {needed / 2**30:.1f} GiB needed",
            expected=f"at most {available / 2**30:.1f} GiB, which is free",
            do="choose a smaller --width and --height",
        )
    return width, height


def _memory_needed(width: int, height: int, downscale: int) -> int:
    """Bytes that one image's largest tensors take at least: decoder activations, attention."""
    pixels = width * height
    decoder = pixels * 128 * 4 * 3  # input, norm and output of the last block of an SD decoder
    tokens = pixels // downscale**2
    attention = tokens * tokens * 4  # scores of one head
    return max(decoder, attention)


def _memory_available() -> int:
    """Bytes of memory that are free now; endless where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError, AttributeError):
        return 2**63
