"""A request becomes a run: defaults are filled in, every number is checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar, get_args

from sld_edge.engines.checks import exact_text, finite_number, shown, whole_number
from sld_edge.engines.errors import InputError
from sld_edge.runtime.manifest import SHALLOW, Manifest
from sld_edge.runtime.policy import Policy
from sld_edge.runtime.random import MAX_SEED, Rng
from sld_edge.runtime.safety import Safety, preset_of, resolved_safety, safety_from_preset
from sld_edge.runtime.samplers import SafetyUnits, SamplerTable, sampler_table
from sld_edge.runtime.text_filter import concepts_from_texts

MOST_GUIDANCE = 100.0  # above it, numbers overflow and pictures are noise
_MOST_IMAGES = 100_000
_MOST_PIXELS = 1 << 16
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How noise becomes a picture; None means the bundle's default.

    Attributes:
        steps: denoising steps.
        sampler: one of `SAMPLERS`.
        eta: noise added by ddim, 0 to 1.
        rng: "torch" for torch's noise on the CPU, "philox" for torch's noise on CUDA.
        safety_units: units of the safety numbers: "noise" means the same on every model; "raw" is
            the unit of the model's output, as in diffusers.
    """

    steps: int | None = None
    sampler: str | None = None
    eta: float = 0.0
    rng: Rng = "torch"
    safety_units: SafetyUnits = "noise"


@dataclass(frozen=True, kw_only=True)
class Savings:
    """Settings that make a run faster and no longer exact (docs/savings.md).

    Attributes:
        cache_interval: every N-th UNet call runs the whole UNet; the calls in between use the
            features of the deep layers again (DeepCache). 1 is off.
    """

    cache_interval: int = 1


@dataclass(frozen=True, kw_only=True)
class Framing:
    """The picture sizes that SDXL takes as inputs, in pixels; None means diffusers' default.

    Attributes:
        original_size: height and width of the picture before a crop (default: the run's size).
        crop: top and left of the crop (default: 0, 0).
        target_size: height and width that the picture should look like (default: the run's size).
    """

    original_size: Sequence[int] | None = None
    crop: Sequence[int] = (0, 0)
    target_size: Sequence[int] | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """The settings that a caller asks for; None means the bundle's default.

    A sequence holds a value for each prompt. For `safety_concept`, a tuple holds several concepts
    for every prompt, and a list holds the concepts of each prompt. Every prompt makes `count`
    images, with seeds `seed`, `seed + 1`, …
    """

    prompts: tuple[str, ...]
    negative_prompt: str | Sequence[str | None] | None = None
    safety: str | Safety | Sequence[str | Safety] | None = None
    safety_concept: str | tuple[str, ...] | Sequence[str | tuple[str, ...]] | None = None
    safety_numbers: Mapping[str, Any] = field(default_factory=dict)  # replace numbers of the preset
    text_filter: str | tuple[str, ...] | bool | None = None  # concepts; None: as the preset says
    guidance_scale: float | Sequence[float] | None = None
    seed: int | Sequence[int] = 0
    count: int = 1
    width: int | None = None
    height: int | None = None
    sampling: Sampling = Sampling()
    savings: Savings = Savings()
    framing: Framing = Framing()


@dataclass(frozen=True, kw_only=True)
class ImageRun:
    """One image of a run: every setting that may differ within a batch.

    Some models treat no negative prompt (None) differently from the empty text. `concepts` has no
    text twice. `text_filter` has the concepts that a text filter takes out of the prompt.
    """

    prompt: str
    negative_prompt: str | None
    seed: int
    guidance_scale: float
    preset: str
    safety: Safety
    concepts: tuple[str, ...]
    text_filter: tuple[str, ...] = ()

    @property
    def edited_concepts(self) -> tuple[str, ...]:
        """The concepts with a safety branch; none without an edit."""
        return self.concepts if self.safety.edits else ()

    @property
    def acting_concepts(self) -> tuple[str, ...]:
        """The concepts with a branch, or in the negative prompt."""
        return self.concepts if self.safety.edits or self.safety.negative else ()

    @property
    def acting_filter(self) -> tuple[str, ...]:
        """The concepts that are taken out of the prompt; none without a text filter."""
        return self.text_filter if self.safety.text_filter else ()

    @property
    def unconditional_text(self) -> str | None:
        """The text of the unconditional branch; the model may cut its end, not the concepts."""
        if not self.safety.negative:
            return self.negative_prompt
        return ", ".join((*self.concepts, *filter(None, (self.negative_prompt,))))


@dataclass(frozen=True, kw_only=True)
class Run:
    """A resolved request: its images, and the settings that they share.

    Attributes:
        images: every image.
        table: the sampler.
        steps: denoising steps.
        eta: see `Sampling`.
        rng: see `Sampling`.
        width: in pixels.
        height: in pixels.
        savings: see `Savings`.
        time_ids: six numbers, see `Framing`.
        policy: SHA-256 of the policy at the time of resolving; None without a policy.
        raised: settings that the policy made stricter than the bundle's defaults.
    """

    images: tuple[ImageRun, ...]
    table: SamplerTable
    steps: int
    eta: float
    rng: Rng
    width: int
    height: int
    savings: Savings
    time_ids: tuple[int, ...]
    policy: str | None = None
    raised: tuple[str, ...] = ()


def run_from_request(request: Request, manifest: Manifest, *, policy: Policy) -> Run:
    """Resolve a request against a bundle and this device's policy.

    Raises:
        InputError: a setting that is not possible; the error names the possible values.
    """
    defaults, sampling = manifest.defaults, request.sampling
    steps = sampling.steps if sampling.steps is not None else defaults.steps
    steps = whole_number("steps", steps, 1, 1000)
    count = whole_number("count", request.count, 1, _MOST_IMAGES)
    for name, value, kind in (
        ("rng", sampling.rng, Rng),
        ("safety_units", sampling.safety_units, SafetyUnits),
    ):
        if value not in get_args(kind):
            raise InputError(name, got=shown(value), expected="one of " + ", ".join(get_args(kind)))
    sampler = sampling.sampler if sampling.sampler is not None else defaults.sampler
    eta = finite_number("eta", sampling.eta, 0, 1)
    table = table_for(
        manifest, exact_text("sampler", sampler), steps, eta=eta, safety_units=sampling.safety_units
    )
    width, height = _size(request, manifest)
    prompts = len(request.prompts)
    if not 0 < prompts * count <= _MOST_IMAGES:
        raise InputError(
            "no prompt given" if not prompts else "images",
            got=prompts * count,
            expected=f"1 to {_MOST_IMAGES}",
        )
    default = policy.default_preset(defaults.safety)
    absent: str | None = None
    negative = _each("negative_prompt", request.negative_prompt, prompts, absent)
    preset: str | Safety = default
    safety = _each("safety", request.safety, prompts, preset)
    concept = _concepts(request.safety_concept, prompts)
    scale = _each("guidance_scale", request.guidance_scale, prompts, defaults.guidance_scale)
    seeds = _each("seed", request.seed, prompts, 0)
    always = policy.safety.concepts_always if policy.safety is not None else ()
    images: list[ImageRun] = []
    for index, prompt in enumerate(request.prompts):
        name, numbers = _safety(safety[index], concept[index], request, table.calls)
        first = ImageRun(
            prompt=exact_text("prompt", prompt),
            negative_prompt=None
            if negative[index] is None
            else exact_text("negative prompt", negative[index]),
            seed=whole_number("seed", seeds[index], 0, MAX_SEED),
            guidance_scale=finite_number("guidance scale", scale[index], 0, MOST_GUIDANCE),
            preset=name,
            safety=numbers,
            concepts=different_concepts(always, numbers.concept, manifest.safety_concepts),
            text_filter=filtered_concepts(always, numbers, manifest, request.text_filter),
        )
        seed_range = range(first.seed, first.seed + count)
        images.extend(replace(first, seed=seed % (MAX_SEED + 1)) for seed in seed_range)
    raised = {
        "safety": request.safety is None and default != defaults.safety,
        "safety_concept": bool(always),
    }
    return Run(
        images=tuple(images),
        table=table,
        steps=steps,
        eta=eta,
        rng=sampling.rng,
        width=width,
        height=height,
        savings=_savings(request.savings, steps, manifest),
        time_ids=_time_ids(request.framing, height, width),
        policy=policy.digest,
        raised=tuple(name for name, is_raised in raised.items() if is_raised),
    )


def table_for(
    manifest: Manifest, sampler: str, steps: int, *, eta: float, safety_units: SafetyUnits
) -> SamplerTable:
    """Compute a sampler's table for a bundle.

    Raises:
        InputError: settings that the sampler does not have.
    """
    config = {**manifest.scheduler, "prediction_type": manifest.prediction_type}
    return sampler_table(sampler, config, steps, eta=eta, safety_units=safety_units)


def _each(name: str, value: T | Sequence[T] | None, count: int, default: T) -> Sequence[T]:
    """Return a value for each prompt, from a single value or from a sequence of `count` values."""
    if value is None:
        return [default] * count
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise InputError(
            name, got=f"{len(value)} values", expected=f"one value, or {count}: one for each prompt"
        )
    return value


def _concepts(
    value: str | tuple[str, ...] | Sequence[str | tuple[str, ...]] | None, prompts: int
) -> Sequence[str | tuple[str, ...] | None]:
    """Return a text or a tuple of texts for each prompt; None means the bundle's concepts."""
    if isinstance(value, tuple):
        return [value] * prompts
    if isinstance(value, list) and len(value) != prompts:
        raise InputError(
            "safety_concept",
            got=f"a list of {len(value)} texts",
            expected=f"a list of {prompts}: a text for each prompt",
            do="for several concepts at once, give a tuple",
        )
    absent: str | tuple[str, ...] | None = None
    return _each("safety_concept", value, prompts, absent)


def different_concepts(
    always: tuple[str, ...], concept: str | tuple[str, ...] | None, default: tuple[str, ...]
) -> tuple[str, ...]:
    """Join concepts, each text once: a repeated concept costs a UNet branch and changes nothing."""
    if concept is None:
        concept = default
    elif isinstance(concept, str):
        concept = (concept,)
    return tuple(dict.fromkeys((*always, *concept)))


def _safety(
    value: str | Safety,
    concept: str | tuple[str, ...] | None,
    request: Request,
    calls: int,
) -> tuple[str, Safety]:
    changed = request.safety_numbers
    if isinstance(value, Safety):
        # A copy, so that a subclass of Safety cannot change its values later.
        numbers = Safety(**{item.name: getattr(value, item.name) for item in fields(Safety)})
        preset = "custom" if numbers.acts else "off"
    elif isinstance(value, str):
        preset, numbers = value, safety_from_preset(value, calls=calls)
    else:
        raise InputError("safety", got=shown(value), expected="a preset's name or a Safety")
    if not numbers.acts and concept is not None:
        raise InputError(
            "a safety concept does nothing with safety off", do="choose a preset, or leave it out"
        )
    if changed and not numbers.edits:
        raise InputError(
            f"safety numbers do nothing with safety {preset}",
            do="choose a preset with an edit, or leave them out",
        )
    if changed:
        preset, numbers = "custom", replace(numbers, **dict(changed))
        if not numbers.edits:
            raise InputError("safety scale 0 switches safety off", do="use the preset off instead")
    if concept is not None:
        numbers = replace(numbers, concept=concept)
    numbers = resolved_safety(numbers, calls=calls)
    if request.text_filter is not None:
        numbers = replace(numbers, text_filter=request.text_filter is not False)
        preset = preset_of(numbers, calls=calls) or "custom"
    return preset, numbers


def filtered_concepts(
    always: tuple[str, ...],
    numbers: Safety,
    manifest: Manifest,
    asked: str | tuple[str, ...] | bool | None = None,
) -> tuple[str, ...]:
    """Return the concepts that a text filter takes out of a prompt, each once.

    The caller's texts come first; else those of the caller's safety concept, of the bundle's
    filter, or of the bundle's safety concept.

    Raises:
        InputError: texts of another type.
    """
    texts: str | tuple[str, ...]
    if asked is not None and not isinstance(asked, bool):
        texts = asked
    elif numbers.concept is not None:
        texts = numbers.concept
    elif manifest.text_filter is not None:
        texts = manifest.text_filter.concepts
    else:
        texts = manifest.safety_concepts
    if not isinstance(texts, str | tuple):
        raise InputError("text filter", got=shown(texts), expected="a text or a tuple of texts")
    texts = (texts,) if isinstance(texts, str) else texts
    return concepts_from_texts([exact_text("text filter", text) for text in (*always, *texts)])


def _savings(savings: Savings, steps: int, manifest: Manifest) -> Savings:
    """Check the interval; more than 1 needs a component that some bundles lack."""
    interval = whole_number("cache interval", savings.cache_interval, 1, steps)
    if interval > 1 and SHALLOW not in manifest.components:
        raise InputError(
            f"cache interval {interval} with a bundle that has no {SHALLOW}",
            do=f"export it again without --via torch, which makes no {SHALLOW}, or leave it out",
        )
    return Savings(cache_interval=interval)


def _time_ids(framing: Framing, height: int, width: int) -> tuple[int, ...]:
    """Return original height and width, top and left of the crop, target height and width."""
    pairs = {
        "original size": (height, width)
        if framing.original_size is None
        else framing.original_size,
        "crop": framing.crop,
        "target size": (height, width) if framing.target_size is None else framing.target_size,
    }
    numbers: list[int] = []
    for name, pair in pairs.items():
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InputError(name, got=shown(pair), expected="two whole numbers")
        numbers += [whole_number(name, value, 0, _MOST_PIXELS) for value in pair]
    return tuple(numbers)


def _size(request: Request, manifest: Manifest) -> tuple[int, int]:
    factor = manifest.latents.downscale
    sizes = []
    for name in ("width", "height"):
        asked = getattr(request, name)
        value = asked if asked is not None else getattr(manifest.size, name)
        value = whole_number(name, value, factor, _MOST_PIXELS)
        if value % factor:
            raise InputError(name, got=value, expected=f"a multiple of {factor} pixels")
        sizes.append(value)
    return sizes[0], sizes[1]
