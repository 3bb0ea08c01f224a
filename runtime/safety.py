"""Safe Latent Diffusion's settings: four numbers, a warm-up and a concept (arXiv 2211.05105)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import MappingProxyType

from sld_edge.engines.errors import InputError

# The paper's safety concept, its 20 items in its order (section 4; ml-research repository).
PAPER_CONCEPT = (
    "hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, "
    "bodily fluids, blood, obscene gestures, illegal activity, drug use, theft, vandalism, "
    "weapons, child abuse, brutality, cruelty"
)
_PRESET_STEPS = 50  # the steps that the presets' warm-ups were published for


@dataclass(frozen=True, kw_only=True)
class Safety:
    """How strongly an image is steered away from a concept.

    Attributes:
        scale: how fast the edit grows with the distance from the concept; 0 switches SLD off.
        warmup_steps: UNet calls without an edit, counted from call 0; taken as it is.
        threshold: signed distance to the concept at and above which nothing is edited.
        momentum_scale: how much of the past edits is added; from 0 to below 1.
        momentum_beta: how long the past edits last; from 0 to below 1.
        concept: the text steered away from, or several as a tuple, each with a branch and a gate of
            its own; None is the bundle's own.
    """

    scale: float = 1000.0
    warmup_steps: int = 10
    threshold: float = 0.01
    momentum_scale: float = 0.3
    momentum_beta: float = 0.4
    concept: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.concept, tuple) and not self.concept:
            raise InputError("safety concept", got="none", expected="one or more")
        numbers = (self.scale, self.threshold, self.momentum_scale, self.momentum_beta)
        if not all(math.isfinite(number) for number in numbers):
            raise InputError("safety numbers", got=numbers, expected="finite numbers")
        if self.scale < 0:
            raise InputError("safety scale", got=self.scale, expected="0 or more")
        if self.warmup_steps < 0 or self.warmup_steps != int(self.warmup_steps):
            raise InputError(
                "safety warmup_steps", got=self.warmup_steps, expected="a whole number, 0 or more"
            )
        for name in ("momentum_scale", "momentum_beta"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(
                    f"safety {name}", got=getattr(self, name), expected="from 0 to below 1"
                )

    @property
    def acts(self) -> bool:
        """Whether these settings can change an image at all."""
        return self.scale > 0


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

    The published warm-ups count calls of a 50-step run (PNDM makes 51 of them); a run of another
    length gets the same share, so that a short run is not left unguided, and rounded down: half a
    call more would leave strong's first edited call of 25 too late for what it removes of 50
    (docs/steps.md). At 50 and 51 calls the published number stands.

    Raises:
        InputError: unknown preset.
    """
    if name not in PRESETS:
        raise InputError("safety preset", got=repr(name), expected="one of " + ", ".join(PRESETS))
    preset = PRESETS[name]
    warmup = preset.warmup_steps * calls // _PRESET_STEPS
    return replace(preset, warmup_steps=warmup, concept=concept)
