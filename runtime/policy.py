"""The policy of a device's owner: rules that no caller can weaken (docs/policy.md).

A policy makes a setting stricter or refuses it; it never changes a setting without a message.
`policy_file` reads the file.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from sld_edge.engines.errors import PolicyError
from sld_edge.runtime.safety import (
    PRESETS,
    STRONGEST,
    Safety,
    is_as_strong,
    preset_of,
    safety_from_preset,
)

POLICY_FILE = (
    Path("C:/ProgramData/sld-edge/policy.json")
    if sys.platform == "win32"
    else Path("/etc/sld-edge/policy.json")
)
OnFlag = Literal["report", "escalate", "blur", "withhold", "escalate-withhold"]
ON_FLAG: tuple[OnFlag, ...] = get_args(OnFlag)
Recipe = Literal["keep", "omit"]
RECIPES: tuple[Recipe, ...] = get_args(Recipe)
_CALLS = 50  # the presets are compared in a run of this length
Custom = Literal["refuse", "stronger"]
Allow = Literal["allow", "refuse"]


@dataclass(frozen=True, kw_only=True)
class SafetyRules:
    """The safety settings that every picture must have.

    Attributes:
        minimum: the weakest preset that is allowed.
        custom: for safety numbers that are not a preset's: "refuse" them, or allow them if each is
            at least as strong as the minimum's ("stronger").
        concepts_always: texts that every picture is steered away from, each with its own branch.
        cache_interval_max: the largest cache interval.
        guidance_scale: smallest and largest guidance scale.
        negative_prompt: whether callers may give a negative prompt; it weakens the edit, which is
            measured from it.
    """

    minimum: str = "off"
    custom: Custom = "refuse"
    concepts_always: tuple[str, ...] = ()
    cache_interval_max: int = 1
    guidance_scale: tuple[float, float] = (0.0, 100.0)
    negative_prompt: Allow = "refuse"


@dataclass(frozen=True, kw_only=True)
class PolicyScorer:
    """A scorer for every picture: the SHA-256 of its model and, for some scorers, its path."""

    sha256: str
    path: Path | None = None


@dataclass(frozen=True, kw_only=True)
class ScreeningRules:
    """How every picture is screened before it leaves the pipeline.

    Attributes:
        scorers: the scorers, by name.
        rule_at_least: a rule that flags a picture in addition to the caller's rule.
        on_flag: the mildest treatment of a flagged picture that is allowed.
        previews: whether unfinished pictures may be shown.
        report_recipe: whether the report of a flagged picture keeps the prompt and the seed.
    """

    scorers: Mapping[str, PolicyScorer]
    rule_at_least: str
    on_flag: OnFlag = "withhold"
    previews: Literal["allow", "forbid"] = "forbid"
    report_recipe: Recipe = "omit"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A device's policy; without a file every setting is allowed.

    Attributes:
        digest: SHA-256 of the file; None without a file.
        safety: rules for the safety settings of every picture.
        screening: rules for the screening of every picture; None leaves screening to the caller.
        signers: keys, "ed25519:<base64>"; every bundle must be signed by one of them.
        bundles: SHA-256 of `bundle.json` of bundles that need no signature.
        trust_plan: whether a caller may run plans that `plans.json` does not list.
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
        """The weakest preset that is allowed."""
        return "off" if self.safety is None else self.safety.minimum

    def default_preset(self, preset: str) -> str:
        """Return `preset`, the bundle's default, or a preset as strong as it and the minimum."""
        if preset not in PRESETS:
            return preset  # the next check refuses it
        both = [safety_from_preset(name, calls=_CALLS) for name in (preset, self.minimum)]
        for name in (preset, self.minimum):
            chosen = safety_from_preset(name, calls=_CALLS)
            if all(is_as_strong(chosen, each, calls=_CALLS) for each in both):
                return name
        return STRONGEST

    @property
    def allowed_presets(self) -> tuple[str, ...]:
        """The presets that are as strong as the minimum."""
        floor = safety_from_preset(self.minimum, calls=_CALLS)
        return tuple(
            name
            for name in PRESETS
            if is_as_strong(safety_from_preset(name, calls=_CALLS), floor, calls=_CALLS)
        )

    def require_safety(self, safety: Safety, *, calls: int) -> None:
        """Refuse a picture's resolved safety numbers if they are weaker than the minimum.

        Raises:
            PolicyError: weaker numbers, or numbers of no preset where the policy allows only
                presets.
        """
        if self.safety is None:
            return
        floor = safety_from_preset(self.minimum, calls=calls)
        strong = is_as_strong(safety, floor, calls=calls)
        preset = preset_of(safety, calls=calls)
        if preset is not None:
            expected = f"as strong as {self.minimum}: {', '.join(self.allowed_presets)}"
            self.require(strong, "safety", got=preset, expected=expected)
        elif self.safety.custom == "refuse":
            raise self.error(
                "safety numbers that are no preset", expected="a preset", do=f"use {self.minimum}"
            )
        elif not strong:
            raise self.error(
                "safety numbers that are no preset",
                got=_text(safety),
                expected=f"each at least as strong as {self.minimum}'s: {_text(floor)}",
            )

    def require(self, allowed: bool, setting: str, *, got: object = None, expected: object) -> None:
        """Refuse a setting that is not allowed.

        Raises:
            PolicyError: `allowed` is false.
        """
        if not allowed:
            raise self.error(setting, got=got, expected=expected)

    def require_previews(self, setting: str) -> None:
        """Refuse to show pictures that were not screened, if the policy forbids previews.

        Raises:
            PolicyError: previews are forbidden.
        """
        rules = self.screening
        allowed = rules is None or rules.previews == "allow"
        self.require(allowed, setting, expected="none, or run()")

    def error(
        self, setting: str, *, got: object = None, expected: object, do: str | None = None
    ) -> PolicyError:
        """Return an error that names the policy."""
        return PolicyError(
            f"the policy of this device ({POLICY_FILE}): {setting}",
            got=got,
            expected=expected,
            do=do,
        )

    def text(self) -> str:
        """Return the rules as lines for a person."""
        if self.digest is None:
            return f"no policy: there is no {POLICY_FILE}; callers may choose any setting"
        lines = [f"policy {POLICY_FILE}, SHA-256 {self.digest}"]
        if self.safety is not None:
            rules = self.safety
            lines += [
                f"safety: {', '.join(self.allowed_presets)}; numbers that are no preset: "
                + ("refused" if rules.custom == "refuse" else "each at least as strong"),
                f"guidance scale: {rules.guidance_scale[0]:g} to {rules.guidance_scale[1]:g}; "
                f"negative prompt: {rules.negative_prompt}",
                f"cache interval: at most {rules.cache_interval_max}",
            ]
            lines += [f"safety concept of every picture: {text}" for text in rules.concepts_always]
        if self.screening is not None:
            screening = self.screening
            lines += [
                f"scorers of every picture: {', '.join(screening.scorers)}; flagged if "
                f"{screening.rule_at_least}; then at least: {screening.on_flag}",
                f"previews: {screening.previews}; report of a flagged picture: recipe "
                f"{screening.report_recipe}",
            ]
        if self.signers or self.bundles:
            lines.append(
                f"bundles: signed with one of {len(self.signers)} keys, or one of "
                f"{len(self.bundles)} bundles named by hash"
            )
        lines.append(
            f"plans that plans.json does not list: {'allowed' if self.trust_plan else 'refused'}"
        )
        lines.append(f"measurements without safety: {'allowed' if self.allow_off else 'refused'}")
        return "\n".join(lines)


NO_POLICY = Policy()


def _text(safety: Safety) -> str:
    numbers = {
        "scale": safety.scale,
        "warm-up": safety.warmup,
        "threshold": safety.threshold,
        "momentum scale": safety.momentum_scale,
        "beta": safety.momentum_beta,
        "stop": safety.stop_step,
        "text filter": safety.text_filter or None,
        "concept as negative prompt": safety.negative or None,
    }
    shown = {name: value for name, value in numbers.items() if value is not None}
    return ", ".join(
        name if value is True else f"{name} {value:g}" for name, value in shown.items()
    )
