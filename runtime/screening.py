"""Pictures are scored before anyone sees them; what then happens to those that are flagged.

A scorer that cannot run ends the run before anything is written: there is no picture without a
verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from sld_edge.engines.errors import InputError
from sld_edge.runtime.picture import blurred
from sld_edge.runtime.policy import ON_FLAG, RECIPES, OnFlag, Policy, Recipe
from sld_edge.runtime.report import without_recipe
from sld_edge.runtime.request import ImageRun, Run
from sld_edge.runtime.result import Result
from sld_edge.runtime.safety import PRESETS, safety_from_preset
from sld_edge.runtime.scorers import (
    Rule,
    Scorer,
    flagged,
    rule_from_text,
    score_pictures,
    scorers_from_names,
    text_from_rule,
)

Make = Callable[[Run], Result]
LADDER = tuple(PRESETS)
_OURS = "sld_edge.runtime.scorers."
_ESCALATES = ("escalate", "escalate-withhold")
# What each choice gives of a flagged picture: sharp, sharp if max does not help, blurred, nothing.
_STRICTNESS = {"report": 0, "escalate": 1, "blur": 2, "withhold": 3, "escalate-withhold": 3}


@dataclass(frozen=True, kw_only=True)
class Screening:
    """How pictures are judged, and what is done with those that are flagged.

    Attributes:
        scorers: that look at every picture.
        rule: when their scores flag one.
        on_flag: "report" says so only; "blur" and "withhold" give no sharp picture or none;
            "escalate" runs again with the next stronger preset until none flags it or the last is
            reached, and then gives the picture; "escalate-withhold" gives none then. None is the
            policy's choice, or "report".
        report_recipe: "omit" leaves prompt and seed out of the report of a picture that was blurred
            or withheld. None is the policy's choice, or "keep".
    """

    scorers: Sequence[Scorer]
    rule: Rule
    on_flag: OnFlag | None = None
    report_recipe: Recipe | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the scorers said of one picture, and whether the rule flags it."""

    scores: Mapping[str, float]
    flagged: bool


def screening_under(
    policy: Policy, asked: Screening | None, run: Run, scorers: Sequence[Scorer]
) -> Screening | None:
    """Return how a run's pictures are screened: as asked for, and never less than the policy says.

    Args:
        policy: this device's.
        asked: the caller's screening.
        run: the run.
        scorers: those that the policy names.

    Raises:
        InputError: an unknown choice, no scorer, or numbers of one's own that no preset follows.
        PolicyError: a choice that is less than the policy says.
    """
    rules = policy.screening
    if asked is None and rules is None:
        return None
    if asked is None:
        asked = Screening(scorers=(), rule=())
    for name, value, choices in (
        ("on-flag", asked.on_flag, ON_FLAG),
        ("report recipe", asked.report_recipe, RECIPES),
    ):
        if value is not None and value not in choices:
            raise InputError(name, got=repr(value), expected=f"one of {', '.join(choices)}")
    for scorer in asked.scorers if rules is not None else ():
        policy.require(
            type(scorer).__module__.startswith(_OURS),
            "a scorer of your own, which would see pictures before they are judged",
            got=getattr(scorer, "name", scorer),
            expected="one of sld-edge's",
        )
    least: OnFlag = "report" if rules is None else rules.on_flag
    recipe: Recipe = "keep" if rules is None else rules.report_recipe
    own = {scorer.name: scorer for scorer in (*asked.scorers, *scorers)}  # the policy's go before
    screening = Screening(
        scorers=tuple(own.values()),
        rule=asked.rule if rules is None else (*rule_from_text(rules.rule_at_least), *asked.rule),
        on_flag=asked.on_flag if asked.on_flag is not None else least,
        report_recipe=asked.report_recipe if asked.report_recipe is not None else recipe,
    )
    assert screening.on_flag is not None
    policy.require(
        _STRICTNESS[screening.on_flag] >= _STRICTNESS[least],
        "what happens to a flagged picture",
        got=screening.on_flag,
        expected=f"{least} or stricter",
    )
    policy.require(
        recipe == "keep" or screening.report_recipe == "omit",
        "the report of a flagged picture",
        got="recipe keep",
        expected="recipe omit",
    )
    if not screening.scorers:
        raise InputError("no scorer to flag a picture", do="name one with --scorer")
    if screening.on_flag in _ESCALATES:
        for image in run.images:
            if image.preset not in LADDER:
                raise InputError(
                    "escalating starts from a preset",
                    got="safety numbers of its own",
                    expected=f"one of {', '.join(LADDER)}",
                )
    return screening


def policy_scorers(policy: Policy) -> list[Scorer]:
    """Load the scorers that a policy names.

    Raises:
        PolicyError: one whose model is another than the policy says.
        UserError: one that is unknown, not installed, or cannot be loaded.
    """
    if policy.screening is None:
        return []
    named = policy.screening.scorers
    paths = {name: entry.path for name, entry in named.items() if entry.path is not None}
    scorers = scorers_from_names(tuple(named), paths)
    for scorer in scorers:
        wanted = named[scorer.name].sha256
        policy.require(
            scorer.sha256 == wanted,
            f"scorer {scorer.name} is another model",
            got=f"SHA-256 {scorer.sha256[:12]}…",
            expected=f"{wanted[:12]}…",
        )
    return scorers


def screened_run(make: Make, run: Run, screening: Screening) -> Result:
    """Make a run, score its pictures, and do with flagged ones what `screening` says.

    Each report gains `flagged`, `scores` and `screening` (see docs/scorers.md). Of a picture that
    is withheld, `images` holds a plain grey one and `edit_maps` zeros; `latents`, which any picture
    can be made from again, are zeros wherever it was blurred or withheld.

    Args:
        make: makes a run's pictures.
        run: the run.
        screening: from `screening_under`.

    Raises:
        InputError: a rule that names a score no scorer gives.
        UserError: a run or a scorer that failed.
    """
    result = make(run)
    verdicts = _judge(result, run.images, screening)
    attempts = [
        [_attempt(image, verdict, report)]
        for image, verdict, report in zip(run.images, verdicts, result.reports, strict=True)
    ]
    images = list(run.images)
    while screening.on_flag in _ESCALATES:
        places = [
            place
            for place, verdict in enumerate(verdicts)
            if verdict.flagged and stronger(images[place].preset) is not None
        ]
        if not places:
            break
        for place in places:
            images[place] = escalated(images[place], calls=run.table.calls)
        again = replace(run, images=tuple(images[place] for place in places))
        part = make(again)
        found = _judge(part, again.images, screening)
        for index, place in enumerate(places):
            verdicts[place] = found[index]
            attempts[place].append(_attempt(images[place], found[index], part.reports[index]))
        result = _with(result, part, places)
    return _finished(result, verdicts, attempts, screening)


def stronger(preset: str) -> str | None:
    """Return the next stronger preset; None after the last and for numbers of one's own."""
    if preset not in LADDER[:-1]:
        return None
    return LADDER[LADDER.index(preset) + 1]


def escalated(image: ImageRun, *, calls: int) -> ImageRun:
    """Return the same picture with the next stronger preset, the same concept and seed.

    Raises:
        InputError: no preset is stronger.
    """
    preset = stronger(image.preset)
    if preset is None:
        raise InputError("no preset is stronger", got=image.preset)
    safety = safety_from_preset(preset, calls=calls, concept=image.safety.concept)
    return replace(image, preset=preset, safety=safety)


def _judge(result: Result, images: Sequence[ImageRun], screening: Screening) -> list[Verdict]:
    pictures = np.stack([np.asarray(image) for image in result.images])
    found = score_pictures(
        screening.scorers, pictures, [image.prompt for image in images], result.reports
    )
    return [Verdict(scores=scores, flagged=flagged(scores, screening.rule)) for scores in found]


def _attempt(image: ImageRun, verdict: Verdict, report: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "preset": image.preset,
        "mean_share": report["safety"]["mean_share"],
        "scores": dict(verdict.scores),
        "flagged": verdict.flagged,
    }


def _with(result: Result, part: Result, places: Sequence[int]) -> Result:
    """Put a part's pictures in the places of others."""
    images, reports = list(result.images), list(result.reports)
    latents, edit_maps = result.latents.copy(), result.edit_maps.copy()
    for index, place in enumerate(places):
        images[place], reports[place] = part.images[index], part.reports[index]
        latents[place], edit_maps[place] = part.latents[index], part.edit_maps[index]
    return Result(images=images, latents=latents, edit_maps=edit_maps, reports=reports)


def _finished(
    result: Result,
    verdicts: Sequence[Verdict],
    attempts: Sequence[Sequence[Mapping[str, Any]]],
    screening: Screening,
) -> Result:
    images, reports = [], []
    latents, edit_maps = result.latents.copy(), result.edit_maps.copy()
    for index, (image, verdict) in enumerate(zip(result.images, verdicts, strict=True)):
        report = result.reports[index]
        done = _done(verdict, attempts[index], screening)
        if done == "blurred":
            image = blurred(image)
        elif done == "withheld":
            image = Image.new("RGB", image.size, (128, 128, 128))
            edit_maps[index] = 0
        if done in ("blurred", "withheld"):
            latents[index] = 0
            if screening.report_recipe == "omit":
                report = without_recipe(report)
        images.append(image)
        reports.append(
            {
                **report,
                "flagged": verdict.flagged,
                "scores": dict(verdict.scores),
                "screening": {
                    "rule": text_from_rule(screening.rule),
                    "on_flag": screening.on_flag,
                    "done": done,
                    "attempts": list(attempts[index]),
                    "scorers": {scorer.name: scorer.sha256 for scorer in screening.scorers},
                },
            }
        )
    return Result(images=images, latents=latents, edit_maps=edit_maps, reports=reports)


def _done(verdict: Verdict, attempts: Sequence[object], screening: Screening) -> str:
    """What happened to one picture: "nothing", "blurred", "withheld" or "escalated"."""
    if verdict.flagged and screening.on_flag == "blur":
        return "blurred"
    if verdict.flagged and screening.on_flag in ("withhold", "escalate-withhold"):
        return "withheld"
    return "escalated" if len(attempts) > 1 else "nothing"
