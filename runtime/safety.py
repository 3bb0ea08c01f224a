"""Settings of safety: numbers of Safe Latent Diffusion (arXiv 2211.05105), and two more layers.

The layers are a text filter, which takes words out of the prompt (`text_filter`), and the concept
as negative prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import MappingProxyType

from sld_edge.engines.checks import exact_text, finite_number, shown, whole_number
from sld_edge.engines.errors import InputError

# The paper's safety concept, its 20 items in its order (section 4; ml-research repository).
PAPER_CONCEPT = (
    "hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, "
    "bodily fluids, blood, obscene gestures, illegal activity, drug use, theft, vandalism, "
    "weapons, child abuse, brutality, cruelty"
)
# Safety had no effect if the edit of every call is below this share of the guided noise_pred. On
# the miniature (15 steps, 16 pictures for each preset) the weakest preset reached 0.20 or more in
# every picture; rounding alone, with an empty concept, reached at most 0.00002 in FP32. A rounding
# step of FP16 is 0.001.
NO_EFFECT_BELOW = 0.01
_PRESET_STEPS = 50  # the warm-ups of the presets were published for 50 steps
_DEFAULT_WARMUP = 10  # the paper's medium preset, and the reference implementations' default
_LARGEST = 1e6  # of scale and threshold; far below the limits of float32 arithmetic
_LEAST_SCALE = 1e-3  # with a smaller scale, no edit is larger than rounding
_MOST_CONCEPTS = 16


@dataclass(frozen=True, kw_only=True)
class Safety:
    """How strongly an image is steered away from a concept.

    Attributes:
        scale: how fast the edit grows with the distance from the concept; 0 switches SLD off.
        warmup_steps: the number of UNet calls without an edit at the start of a run. The number is
            not scaled to the steps of the run, and at least two calls must remain. None is a fifth
            of the calls, like the default of 10 calls in 50.
        threshold: signed distance to the concept at and above which nothing is edited, 0 or more.
        momentum_scale: how much of the past edits is added; from 0 to below 1.
        momentum_beta: how long the past edits last; from 0 to below 1.
        stop_step: the first UNet call without an edit: a whole number counts calls, a number below
            1 is a share of the calls, rounded up. None edits to the end. Later calls have no safety
            branch.
        text_filter: take the concept out of the prompt's embedding (`text_filter.TextFilter`).
        negative: use the concept as negative prompt, before the caller's.
        concept: the text that the image is steered away from, or a tuple of texts, each with its
            own UNet branch and threshold; None is the bundle's concept.

    Raises:
        InputError: a value that is not a number, not finite, or out of range.
    """

    scale: float = 1000.0
    warmup_steps: int | None = None
    threshold: float = 0.01
    momentum_scale: float = 0.3
    momentum_beta: float = 0.4
    stop_step: int | float | None = None
    text_filter: bool = False
    negative: bool = False
    concept: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        checked: dict[str, object] = {
            "scale": finite_number("safety scale", self.scale, 0, _LARGEST),
            "threshold": finite_number("safety threshold", self.threshold, 0, _LARGEST),
            "concept": _concept(self.concept),
        }
        if 0 < self.scale < _LEAST_SCALE:
            raise InputError(
                "safety scale", got=self.scale, expected=f"0, or {_LEAST_SCALE} or more"
            )
        if self.warmup_steps is not None:
            warmup = whole_number("safety warmup_steps", self.warmup_steps, 0, 100_000)
            checked["warmup_steps"] = warmup
        if self.stop_step is not None:
            checked["stop_step"] = _stop_step(self.stop_step)
        for name in ("text_filter", "negative"):
            if not isinstance(getattr(self, name), bool):
                got = shown(getattr(self, name))
                raise InputError(f"safety {name}", got=got, expected="True or False")
        for name in ("momentum_scale", "momentum_beta"):
            checked[name] = finite_number(f"safety {name}", getattr(self, name), 0, 1)
            if checked[name] == 1:
                raise InputError(f"safety {name}", got=1, expected="from 0 to below 1")
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # of the exact built-in types

    @property
    def edits(self) -> bool:
        """Whether Safe Latent Diffusion edits the guidance, which takes a branch per concept."""
        return self.scale > 0

    @property
    def acts(self) -> bool:
        """Whether these settings can change an image at all."""
        return self.edits or self.text_filter or self.negative

    def edits_in(self, call: int) -> bool:
        """Whether a call, counted from 0, is edited; only resolved settings know it."""
        return self.edits and self.warmup <= call and not self.stopped(call)

    def stopped(self, call: int) -> bool:
        """Whether a call, counted from 0, comes after the last edit; for resolved settings."""
        return self.stop_step is not None and call >= self.stop_step

    @property
    def warmup(self) -> int:
        """The warm-up in calls; only settings that are resolved for a run have it."""
        if self.warmup_steps is None:
            raise ValueError("the warm-up is not resolved: see resolved_safety")
        return self.warmup_steps


def _stop_step(value: object) -> int | float:
    if isinstance(value, float) and 0 < value < 1:
        return float(value)
    try:
        return whole_number("safety stop_step", value, 1, 100_000)
    except InputError:
        raise InputError(
            "safety stop_step",
            got=shown(value),
            expected="a whole number of calls, 1 or more, or a share of them between 0 and 1",
        ) from None


def _concept(value: object) -> str | tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        return exact_text("safety concept", value)
    if not isinstance(value, tuple):
        raise InputError("safety concept", got=shown(value), expected="a text or a tuple of texts")
    if not 0 < len(value) <= _MOST_CONCEPTS:
        raise InputError("safety concepts", got=len(value), expected=f"1 to {_MOST_CONCEPTS}")
    return tuple(exact_text("safety concept", text) for text in value)


_OFF = Safety(scale=0, warmup_steps=0, threshold=0, momentum_scale=0, momentum_beta=0)
_MAX = Safety(scale=5000, warmup_steps=0, threshold=1.0, momentum_scale=0.5, momentum_beta=0.7)
# Table of the paper's hyperparameters; warm-up for 50 steps. diffusers' WEAK has scale 20, not 200.
# No number of a preset is weaker than that of the preset before.
PAPER_PRESETS = MappingProxyType(
    {
        "off": _OFF,
        "weak": Safety(scale=200, warmup_steps=15, threshold=0, momentum_scale=0, momentum_beta=0),
        "medium": Safety(
            scale=1000, warmup_steps=10, threshold=0.01, momentum_scale=0.3, momentum_beta=0.4
        ),
        "strong": Safety(
            scale=2000, warmup_steps=7, threshold=0.025, momentum_scale=0.5, momentum_beta=0.7
        ),
        "max": _MAX,
    }
)
# What a picture shows is decided in the first quarter of the calls (docs/shield.md).
_EARLY = replace(_MAX, stop_step=0.25)
PRESETS = MappingProxyType(
    {
        **PAPER_PRESETS,
        "early": _EARLY,
        "guard": replace(_EARLY, text_filter=True),
        "guard-max": replace(_MAX, text_filter=True),
        "guard-lite": replace(_OFF, text_filter=True, negative=True),
    }
)
DEFAULT_PRESET = "guard"  # of a new bundle
STRONGEST = "guard-max"


def safety_from_preset(
    name: str, *, calls: int, concept: str | tuple[str, ...] | None = None
) -> Safety:
    """Return a preset's numbers for a run of `calls` UNet calls.

    The published warm-ups count calls of a 50-step run (PNDM makes 51 calls). A run of another
    length gets the same share of its calls, rounded down. Rounded up, the preset strong would start
    too late in a run of 25 calls and remove less than in 50 calls (docs/steps.md). At 50 and 51
    calls the warm-up is the published number.

    Raises:
        InputError: unknown preset.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise InputError("safety preset", got=shown(name), expected="one of " + ", ".join(PRESETS))
    preset = PRESETS[name]
    warmup = _scaled(preset.warmup, calls)
    return resolved_safety(replace(preset, warmup_steps=warmup, concept=concept), calls=calls)


def preset_of(safety: Safety, *, calls: int) -> str | None:
    """Return the preset with the same resolved settings, the concept aside; None if there is none.

    A preset of another strength can have equal settings in a run of few calls; the first is meant.
    """
    safety = replace(safety, concept=None)
    names = (name for name in PRESETS if safety_from_preset(name, calls=calls) == safety)
    return next(names, None)


def is_as_strong(safety: Safety, floor: Safety, *, calls: int) -> bool:
    """Whether no setting is weaker than the floor's; both are resolved for a run of `calls` calls.

    Numbers, window and layers are compared, not how well they work: a setting can be neither weaker
    nor stronger than another. For numbers, the paper's order of its presets holds. A concept as
    negative prompt is weaker than an edit with the numbers of max in every call.
    """
    rank, least = (_paper_rank(each, calls=calls) for each in (safety, floor))
    numbers = _dominates(safety, floor) if rank is None or least is None else rank >= least
    window = not floor.edits or _end(safety, calls) >= _end(floor, calls)
    max_everywhere = rank == len(PAPER_PRESETS) - 1 and _end(safety, calls) >= calls
    return (
        numbers
        and window
        and safety.text_filter >= floor.text_filter
        and (safety.negative >= floor.negative or max_everywhere)
    )


def _end(safety: Safety, calls: int) -> float:
    return calls if safety.stop_step is None else safety.stop_step


def _paper_rank(safety: Safety, *, calls: int) -> int | None:
    """Return the place of the numbers among the paper's presets, window and layers aside."""
    numbers = replace(safety, stop_step=None, text_filter=False, negative=False, concept=None)
    ranks = [
        rank
        for rank, name in enumerate(PAPER_PRESETS)
        if safety_from_preset(name, calls=calls) == numbers
    ]
    return max(ranks, default=None)


def _dominates(safety: Safety, floor: Safety) -> bool:
    """Whether each number is at least as strong as the floor's.

    A larger momentum_beta keeps past edits longer but also delays a new edit, so it must be equal.
    """
    return (
        safety.scale >= floor.scale
        and safety.warmup <= floor.warmup
        and safety.threshold >= floor.threshold
        and safety.momentum_scale >= floor.momentum_scale
        and (safety.momentum_beta == floor.momentum_beta or not floor.edits)
    )


def empty_concept(concept: str) -> InputError:
    """Return the error for a safety concept that says nothing to the model, like the empty text."""
    return InputError(
        "the safety concept says nothing to the model, so safety could not act",
        got=repr(concept),
        do="use other words, leave it out, or choose the preset off",
    )


def resolved_safety(safety: Safety, *, calls: int) -> Safety:
    """Return settings with warm-up and stop in calls, for a run of `calls` UNet calls.

    Raises:
        InputError: a warm-up that leaves fewer than two calls, or none before the stop.
    """
    if isinstance(safety.stop_step, float):
        safety = replace(safety, stop_step=math.ceil(safety.stop_step * calls))
    if safety.warmup_steps is None:
        safety = replace(safety, warmup_steps=_scaled(_DEFAULT_WARMUP, calls))
    elif safety.edits and 0 < safety.warmup_steps >= calls - 1:
        raise InputError(
            "safety warm-up leaves nothing to edit",
            got=f"{safety.warmup_steps} calls without an edit, of {calls}",
            expected=f"at most {max(0, calls - 2)}",
            do="lower --safety-warmup, or leave it out: then it is a fifth of the calls",
        )
    if safety.edits and safety.stopped(safety.warmup):
        raise InputError(
            "safety stops before it begins",
            got=f"no edit before call {safety.warmup} and from call {safety.stop_step} on",
            do="raise --safety-stop, or lower --safety-warmup",
        )
    return safety


def _scaled(warmup: int, calls: int) -> int:
    return warmup * calls // _PRESET_STEPS
