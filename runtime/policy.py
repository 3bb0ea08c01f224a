"""The settings of a device's owner, which no caller lowers (docs/policy.md).

A policy raises or refuses; it never lowers anything in silence. `policy_file` reads it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from sld_edge.engines.errors import PolicyError
from sld_edge.runtime.safety import PRESETS, Safety, safety_from_preset

POLICY_FILE = (
    Path("C:/ProgramData/sld-edge/policy.json")
    if sys.platform == "win32"
    else Path("/etc/sld-edge/policy.json")
)
OnFlag = Literal["report", "escalate", "blur", "withhold", "escalate-withhold"]
ON_FLAG: tuple[OnFlag, ...] = get_args(OnFlag)
Recipe = Literal["keep", "omit"]
RECIPES: tuple[Recipe, ...] = get_args(Recipe)
Custom = Literal["refuse", "stronger"]
Allow = Literal["allow", "refuse"]
LADDER = tuple(PRESETS)  # from off to max, each number by number at least as strong as the last


@dataclass(frozen=True, kw_only=True)
class SafetyRules:
    """What every picture must have.

    Attributes:
        minimum: the weakest preset.
        custom: "refuse" numbers that are no preset's, or take those that are "stronger" than the
            minimum, number by number.
        concepts_always: texts that are always steered away from, each with a branch of its own.
        cache_interval_max: largest interval between two whole UNet calls.
        guidance_scale: least and most.
        negative_prompt: whether callers may give one; it moves what the edit is measured from.
    """

    minimum: str = "off"
    custom: Custom = "refuse"
    concepts_always: tuple[str, ...] = ()
    cache_interval_max: int = 1
    guidance_scale: tuple[float, float] = (0.0, 100.0)
    negative_prompt: Allow = "refuse"


@dataclass(frozen=True, kw_only=True)
class PolicyScorer:
    """A scorer that judges every picture: the SHA-256 of its model and, of some, where it lies."""

    sha256: str
    path: Path | None = None


@dataclass(frozen=True, kw_only=True)
class ScreeningRules:
    """How every picture is judged before it leaves.

    Attributes:
        scorers: by name.
        rule_at_least: flags a picture, whatever a caller's own rule says.
        on_flag: the least that happens to a flagged picture.
        previews: whether unfinished pictures may be shown.
        report_recipe: whether the report of a flagged picture says how to make it again.
    """

    scorers: Mapping[str, PolicyScorer]
    rule_at_least: str
    on_flag: OnFlag = "withhold"
    previews: Literal["allow", "forbid"] = "forbid"
    report_recipe: Recipe = "omit"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A device's policy; without a file everything is allowed.

    Attributes:
        digest: SHA-256 of the file; None where there is none.
        safety: what every picture must have.
        screening: how every picture is judged; None leaves that to the caller.
        signers: keys, "ed25519:<base64>", one of which must have signed a bundle.
        bundles: SHA-256 of `bundle.json` of bundles that need no signature.
        trust_plan: whether a caller may run plans that no list names.
        allow_off: whether measurements (sld-eval, sld-bench) may make pictures below the minimum.
    """

    digest: str | None = None
    safety: SafetyRules | None = None
    screening: ScreeningRules | None = None
    signers: tuple[str, ...] = ()
    bundles: tuple[str, ...] = ()
    trust_plan: bool = True
    allow_off: bool = True

    @property
    def minimum(self) -> str:
        """The weakest preset that a picture may have."""
        return "off" if self.safety is None else self.safety.minimum

    def default_preset(self, preset: str) -> str:
        """Return what is taken where a caller names none: the bundle's own or the minimum."""
        ranks = {name: rank for rank, name in enumerate(LADDER)}
        return max(preset, self.minimum, key=lambda name: ranks.get(name, len(ranks)))

    def require_safety(self, safety: Safety, *, calls: int) -> None:
        """Refuse the resolved numbers of one picture that are weaker than the minimum's.

        Raises:
            PolicyError: they are; or they are no preset's and the policy takes presets alone.
        """
        if self.safety is None:
            return
        floor = safety_from_preset(self.minimum, calls=calls)
        for name in LADDER:
            if _numbers(safety_from_preset(name, calls=calls)) == _numbers(safety):
                if LADDER.index(name) >= LADDER.index(self.minimum):
                    return
                raise self.error("safety", got=name, expected=f"{self.minimum} or stronger")
        if self.safety.custom == "refuse":
            raise self.error(
                "safety numbers of your own", expected="a preset", do=f"use {self.minimum}"
            )
        if not _dominates(safety, floor):
            raise self.error(
                "safety numbers of your own",
                got=_text(safety),
                expected=f"each at least as strong as {self.minimum}'s: {_text(floor)}",
            )

    def require(self, allowed: bool, what: str, *, got: object = None, expected: object) -> None:
        """Refuse one setting.

        Raises:
            PolicyError: it is not allowed.
        """
        if not allowed:
            raise self.error(what, got=got, expected=expected)

    def require_previews(self, what: str) -> None:
        """Refuse to show pictures that were not screened, where the policy forbids previews.

        Raises:
            PolicyError: it does.
        """
        rules = self.screening
        allowed = rules is None or rules.previews == "allow"
        self.require(allowed, what, expected="none, or run()")

    def error(
        self, what: str, *, got: object = None, expected: object, do: str | None = None
    ) -> PolicyError:
        """Return an error that names the policy."""
        return PolicyError(
            f"the policy of this device ({POLICY_FILE}): {what}", got=got, expected=expected, do=do
        )

    def text(self) -> str:
        """Return what holds, as lines for a person."""
        if self.digest is None:
            return f"no policy: there is no {POLICY_FILE}; every caller chooses freely"
        lines = [f"policy {POLICY_FILE}, SHA-256 {self.digest}"]
        if self.safety is not None:
            rules = self.safety
            lines += [
                f"safety: {rules.minimum} or stronger; numbers of a caller's own: "
                + ("refused" if rules.custom == "refuse" else "each at least as strong"),
                f"guidance scale: {rules.guidance_scale[0]:g} to {rules.guidance_scale[1]:g}; "
                f"negative prompt: {rules.negative_prompt}",
                f"cache interval: at most {rules.cache_interval_max}",
            ]
            lines += [f"always steered away from: {text}" for text in rules.concepts_always]
        if self.screening is not None:
            screening = self.screening
            lines += [
                f"every picture is judged by {', '.join(screening.scorers)}; flagged where "
                f"{screening.rule_at_least}; then at least: {screening.on_flag}",
                f"previews: {screening.previews}; report of a flagged picture: recipe "
                f"{screening.report_recipe}",
            ]
        if self.signers or self.bundles:
            lines.append(
                f"bundles: signed by one of {len(self.signers)} keys, or one of "
                f"{len(self.bundles)} named by hash"
            )
        lines.append(f"plans that no list names: {'allowed' if self.trust_plan else 'refused'}")
        lines.append(f"measurements without safety: {'allowed' if self.allow_off else 'refused'}")
        return "\n".join(lines)


NO_POLICY = Policy()


def _numbers(safety: Safety) -> tuple[float, ...]:
    return (
        safety.scale,
        safety.warmup,
        safety.threshold,
        safety.momentum_scale,
        safety.momentum_beta,
    )


def _dominates(safety: Safety, floor: Safety) -> bool:
    """Whether settings are at least as strong, number by number.

    A longer memory (momentum_beta) delays an edit as well as keeping it, so it must be the same.
    """
    return (
        safety.scale >= floor.scale
        and safety.warmup <= floor.warmup
        and safety.threshold >= floor.threshold
        and safety.momentum_scale >= floor.momentum_scale
        and (safety.momentum_beta == floor.momentum_beta or not floor.acts)
    )


def _text(safety: Safety) -> str:
    names = ("scale", "warm-up", "threshold", "momentum scale", "beta")
    return ", ".join(f"{n} {v:g}" for n, v in zip(names, _numbers(safety), strict=True))
