"""Safe Latent Diffusion's settings: four numbers, a warm-up and a concept (arXiv 2211.05105)."""

from __future__ import annotations

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
        for name in ("momentum_scale", "momentum_beta"):
            checked[name] = finite_number(f"safety {name}", getattr(self, name), 0, 1)
            if checked[name] == 1:
                raise InputError(f"safety {name}", got=1, expected="from 0 to below 1")
        for name, value in checked.items():
            object.__setattr__(self, name, value)  # of the exact built-in types

    @property
    def acts(self) -> bool:
        """Whether these settings can change an image at all."""
        return self.scale > 0

    @property
    def warmup(self) -> int:
        """The warm-up in calls; only settings that are resolved for a run have it."""
        if self.warmup_steps is None:
            raise ValueError("the warm-up is not resolved: see resolved_safety")
        return self.warmup_steps


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


# Table of the paper's hyperparameters; warm-up for 50 steps. diffusers' WEAK has scale 20, not 200.
PRESETS = MappingProxyType(
    {
        "off": Safety(scale=0, warmup_steps=0, threshold=0, momentum_scale=0, momentum_beta=0),
        "weak": Safety(scale=200, warmup_steps=15, threshold=0, momentum_scale=0, momentum_beta=0),
        "medium": Safety(
            scale=1000, warmup_steps=10, threshold=0.01, momentum_scale=0.3, momentum_beta=0.4
        ),
        "strong": Safety(
            scale=2000, warmup_steps=7, threshold=0.025, momentum_scale=0.5, momentum_beta=0.7
        ),
        "max": Safety(
            scale=5000, warmup_steps=0, threshold=1.0, momentum_scale=0.5, momentum_beta=0.7
        ),
    }
)


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
    return replace(preset, warmup_steps=_scaled(preset.warmup, calls), concept=concept)


def empty_concept(concept: str) -> InputError:
    """Return the error for a safety concept that says nothing to the model, like the empty text."""
    return InputError(
        "the safety concept says nothing to the model, so safety could not act",
        got=repr(concept),
        do="use other words, leave it out, or choose the preset off",
    )


def resolved_safety(safety: Safety, *, calls: int) -> Safety:
    """Return settings with their warm-up for a run of `calls` UNet calls.

    Raises:
        InputError: an explicit warm-up that leaves fewer than two calls.
    """
    if safety.warmup_steps is None:
        return replace(safety, warmup_steps=_scaled(_DEFAULT_WARMUP, calls))
    if safety.acts and 0 < safety.warmup_steps >= calls - 1:
        raise InputError(
            "safety warm-up leaves nothing to edit",
            got=f"{safety.warmup_steps} calls without an edit, of {calls}",
            expected=f"at most {max(0, calls - 2)}",
            do="lower --safety-warmup, or leave it out: then it is a fifth of the calls",
        )
    return safety


def _scaled(warmup: int, calls: int) -> int:
    return warmup * calls // _PRESET_STEPS
