"""From what a caller asked for to what will be done: defaults resolved, every number checked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar, get_args

from sld_edge.engines.checks import exact_text, finite_number, shown, whole_number
from sld_edge.engines.errors import InputError
from sld_edge.runtime.bundle import KEPT_SAFETY, SHALLOW, Manifest
from sld_edge.runtime.policy import Policy
from sld_edge.runtime.random import MAX_SEED, Rng
from sld_edge.runtime.safety import Safety, empty_concept, resolved_safety, safety_from_preset
from sld_edge.runtime.samplers import SamplerTable, sampler_table
from sld_edge.runtime.tokenizer import Tokenizer

MOST_GUIDANCE = 100.0  # beyond, numbers overflow and pictures are noise
_MOST_IMAGES = 100_000
_MOST_PIXELS = 1 << 16
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
    """A run: its images, and what they share.

    `policy` is the digest of the policy it was resolved under, `raised` what that policy set where
    the caller said nothing.
    """

    images: tuple[ImagePlan, ...]
    table: SamplerTable
    steps: int
    eta: float
    rng: Rng
    width: int
    height: int
    cache_interval: int
    safety_interval: int
    policy: str | None = None
    raised: tuple[str, ...] = ()


def plan_from_request(
    request: Request, manifest: Manifest, *, tokenizer: Tokenizer, policy: Policy
) -> RunPlan:
    """Resolve a request against a bundle and this device's policy.

    Raises:
        InputError: a setting that cannot be honoured, named with what would be.
        PolicyError: a setting that the policy does not allow.
    """
    defaults = manifest.defaults
    steps = request.steps if request.steps is not None else defaults.steps
    steps = whole_number("steps", steps, 1, 1000)
    count = whole_number("count", request.count, 1, _MOST_IMAGES)
    if request.rng not in get_args(Rng):
        raise InputError("rng", got=shown(request.rng), expected="one of torch, philox")
    sampler = request.sampler if request.sampler is not None else defaults.sampler
    scheduler = {**manifest.scheduler, "prediction_type": manifest.prediction_type}
    eta = finite_number("eta", request.eta, 0, 1)
    table = sampler_table(exact_text("sampler", sampler), scheduler, steps, eta=eta)
    width, height = _size(request, manifest)
    prompts = len(request.prompts)
    if not 0 < prompts * count <= _MOST_IMAGES:
        raise InputError(
            "no prompt given" if not prompts else "images",
            got=prompts * count,
            expected=f"1 to {_MOST_IMAGES}",
        )
    default = policy.default_preset(defaults.safety)
    negative = _each("negative_prompt", request.negative_prompt, prompts, "")
    chosen: str | Safety = default
    safety = _each("safety", request.safety, prompts, chosen)
    concept = _concepts(request.safety_concept, prompts)
    scale = _each("guidance_scale", request.guidance_scale, prompts, defaults.guidance_scale)
    seeds = _each("seed", request.seed, prompts, 0)
    always = policy.safety.concepts_always if policy.safety is not None else ()
    images: list[ImagePlan] = []
    for index, prompt in enumerate(request.prompts):
        name, numbers = _safety(safety[index], concept[index], request.safety_numbers, table.calls)
        first = ImagePlan(
            prompt=exact_text("prompt", prompt),
            negative_prompt=exact_text("negative prompt", negative[index]),
            seed=whole_number("seed", seeds[index], 0, MAX_SEED),
            guidance_scale=finite_number("guidance scale", scale[index], 0, MOST_GUIDANCE),
            preset=name,
            safety=numbers,
            concepts=_different(always, numbers.concept, manifest.safety_concepts),
        )
        seed_range = range(first.seed, first.seed + count)
        images.extend(replace(first, seed=seed % (MAX_SEED + 1)) for seed in seed_range)
    raised = {
        "safety": request.safety is None and default != defaults.safety,
        "safety_concept": bool(always),
    }
    run = RunPlan(
        images=tuple(images),
        table=table,
        steps=steps,
        eta=eta,
        rng=request.rng,
        width=width,
        height=height,
        cache_interval=_interval("cache", request.cache_interval, SHALLOW, steps, manifest),
        safety_interval=_interval("safety", request.safety_interval, KEPT_SAFETY, steps, manifest),
        policy=policy.digest,
        raised=tuple(name for name, was in raised.items() if was),
    )
    require_admitted(run, run.images, manifest=manifest, tokenizer=tokenizer, policy=policy)
    return run


def require_admitted(
    run: RunPlan,
    images: Sequence[ImagePlan],
    *,
    manifest: Manifest,
    tokenizer: Tokenizer,
    policy: Policy,
) -> None:
    """Refuse images of a run that would be made less safe than they say, or than the policy says.

    Resolving does this, and so does running, since a resolved run can be changed in between.

    Raises:
        InputError: a value that is not of the exact type that resolving gives; or a concept that
            says nothing to the model, so that safety could not act.
        PolicyError: what the policy does not allow.
    """
    if policy.digest != run.policy:
        raise policy.error(
            "a run that was resolved under another policy", expected="this one", do="plan it again"
        )
    if not images:
        raise InputError("a run without pictures", do="give a prompt")
    for value, kind in _typed(run, images):
        if type(value) is not kind:
            raise InputError("a resolved run was changed", got=shown(value), expected=kind.__name__)
    rules = policy.safety
    if rules is not None:
        intervals = (run.safety_interval, run.cache_interval)
        limits = (rules.safety_interval_max, rules.cache_interval_max)
        for name, value, most in zip(("safety", "cache"), intervals, limits, strict=True):
            policy.require(value <= most, f"{name} interval", got=value, expected=f"at most {most}")
    read: dict[str, tuple[int, ...]] = {}

    def ids(text: str) -> tuple[int, ...]:
        if text not in read:
            read[text] = tuple(tokenizer(text).ids.tolist())
        return read[text]

    for image in images:
        if not image.safety.acts and rules is None:
            continue
        for concept in image.acting_concepts:
            if tokenizer.says_nothing(concept):
                raise empty_concept(concept)
        if rules is None:
            continue
        policy.require_safety(image.safety, calls=run.table.calls)
        if rules.concepts_always:  # one of a caller's own could push harder the other way
            wanted = _different(rules.concepts_always, None, manifest.safety_concepts)
            policy.require(
                image.concepts == wanted,
                "a safety concept of your own",
                got=" | ".join(image.concepts),
                expected="none: the policy names them",
            )
        for concept in rules.concepts_always:
            cut = tokenizer(concept).cut
            policy.require(not cut, "a concept is too long for the model", got=cut, expected="less")
        least, most_scale = rules.guidance_scale
        policy.require(
            least <= image.guidance_scale <= most_scale,
            "guidance scale",
            got=image.guidance_scale,
            expected=f"{least:g} to {most_scale:g}",
        )
        negative = image.negative_prompt
        policy.require(
            rules.negative_prompt == "allow" or tokenizer.says_nothing(negative),
            "a negative prompt",
            got=negative,
            expected="none",
        )
        # With either, the edit is zero: it is measured between these texts.
        for what, text in (("prompt", image.prompt), ("negative prompt", negative)):
            same = image.acting_concepts and ids(text) in map(ids, image.acting_concepts)
            policy.require(
                not same, f"a {what} that is the safety concept", got=text, expected="another"
            )


def _typed(run: RunPlan, images: Sequence[ImagePlan]) -> Iterator[tuple[object, type]]:
    """Every value that safety depends on, with the exact type that it must have."""
    yield run, RunPlan
    yield run.table, SamplerTable
    yield run.safety_interval, int
    yield run.cache_interval, int
    for image in images:
        yield image, ImagePlan
        yield image.safety, Safety
        yield image.prompt, str
        yield image.negative_prompt, str
        yield image.guidance_scale, float
        yield image.concepts, tuple
        yield from ((concept, str) for concept in image.concepts)
        yield image.safety.warmup_steps, int
        for name in ("scale", "threshold", "momentum_scale", "momentum_beta"):
            yield getattr(image.safety, name), float


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
    always: tuple[str, ...], concept: str | tuple[str, ...] | None, otherwise: tuple[str, ...]
) -> tuple[str, ...]:
    """Drop repeated concepts: they would cost a branch each and change nothing."""
    own = otherwise if concept is None else (concept,) if isinstance(concept, str) else concept
    return tuple(dict.fromkeys((*always, *own)))


def _safety(
    value: str | Safety,
    concept: str | tuple[str, ...] | None,
    changed: Mapping[str, Any],
    calls: int,
) -> tuple[str, Safety]:
    if isinstance(value, Safety):
        own = {item.name: getattr(value, item.name) for item in fields(Safety)}
        numbers = Safety(**own)  # of a subclass, only the numbers
        preset = "custom" if numbers.acts else "off"
    elif isinstance(value, str):
        preset, numbers = value, safety_from_preset(value, calls=calls)
    else:
        raise InputError("safety", got=shown(value), expected="a preset's name or a Safety")
    off = not numbers.acts
    if off and (changed or concept is not None):
        what = "a safety concept does" if concept is not None else "safety numbers do"
        raise InputError(f"{what} nothing with safety off", do="choose a preset, or drop it")
    if changed:
        preset, numbers = "custom", replace(numbers, **dict(changed))
        if not numbers.acts:
            raise InputError("safety scale 0 switches safety off", do="say so: safety off")
    if concept is not None:
        numbers = replace(numbers, concept=concept)
    return preset, resolved_safety(numbers, calls=calls)


def _interval(name: str, value: int, component: str, steps: int, manifest: Manifest) -> int:
    """Check an interval of UNet calls; all but 1 need a component that older bundles lack."""
    value = whole_number(f"{name} interval", value, 1, steps)
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
    width, height = (
        whole_number(name, value, factor, _MOST_PIXELS)
        for name, value in (("width", width), ("height", height))
    )
    for name, value in (("width", width), ("height", height)):
        if value % factor:
            raise InputError(name, got=value, expected=f"a multiple of {factor} pixels")
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
