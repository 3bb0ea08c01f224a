"""Scores pictures before a user sees them, and treats flagged pictures.

A scorer that cannot run ends the run before anything is written: no picture leaves without a
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
from sld_edge.runtime.safety import PRESETS, STRONGEST, safety_from_preset
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
_OURS = "sld_edge.runtime.scorers."
_ESCALATES = ("escalate", "escalate-withhold")
# How much a choice hides of a flagged picture. Of two equal numbers neither is stricter.
_STRICTNESS = {"report": 0, "escalate": 1, "blur": 2, "withhold": 3, "escalate-withhold": 3}


@dataclass(frozen=True, kw_only=True)
class Screening:
    """How pictures are scored, and how flagged pictures are treated.

    Attributes:
        scorers: score every picture.
        rule: flags a picture by its scores.
        on_flag: "report" only marks a flagged picture in the report; "blur" gives it blurred;
            "withhold" gives a grey picture in its place; "escalate" makes it again with the
            strongest preset and gives that picture; "escalate-withhold" does the same but withholds
            a picture that is still flagged. None is the policy's choice, or "report".
        report_recipe: "omit" leaves prompt and seed out of the report of a picture that was blurred
            or withheld. None is the policy's choice, or "keep".
    """

    scorers: Sequence[Scorer]
    rule: Rule
    on_flag: OnFlag | None = None
    report_recipe: Recipe | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The scores of a picture, and whether the rule flags it."""

    scores: Mapping[str, float]
    flagged: bool


def screening_under(
    policy: Policy, asked: Screening | None, run: Run, scorers: Sequence[Scorer]
) -> Screening | None:
    """Return the screening of a run: the caller's choices and the policy's rules together.

    Args:
        policy: this device's policy.
        asked: the caller's screening.
        run: the run.
        scorers: the scorers that the policy names.

    Raises:
        InputError: an unknown choice, no scorer, or escalation from numbers that are no preset.
        PolicyError: a choice that is less strict than the policy's.
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
            "a scorer that is not sld-edge's, which would see pictures before screening",
            got=getattr(scorer, "name", scorer),
            expected="one of sld-edge's",
        )
    least: OnFlag = "report" if rules is None else rules.on_flag
    recipe: Recipe = "keep" if rules is None else rules.report_recipe
    # Of two scorers with the same name, the policy's is taken.
    by_name = {scorer.name: scorer for scorer in (*asked.scorers, *scorers)}
    screening = Screening(
        scorers=tuple(by_name.values()),
        rule=asked.rule if rules is None else (*rule_from_text(rules.rule_at_least), *asked.rule),
        on_flag=asked.on_flag if asked.on_flag is not None else least,
        report_recipe=asked.report_recipe if asked.report_recipe is not None else recipe,
    )
    assert screening.on_flag is not None
    policy.require(
        _STRICTNESS[screening.on_flag] >= _STRICTNESS[least],
        "the treatment of a flagged picture",
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
        raise InputError("no scorer to flag a picture", do="name a scorer with --scorer")
    if screening.on_flag in _ESCALATES:
        for image in run.images:
            if image.preset not in PRESETS:
                raise InputError(
                    "escalation starts from a preset",
                    got="safety numbers that are no preset",
                    expected=f"one of {', '.join(PRESETS)}",
                )
    return screening


def policy_scorers(policy: Policy) -> list[Scorer]:
    """Load the scorers that a policy names.

    Raises:
        PolicyError: the model of a scorer is not the model that the policy names.
        UserError: a scorer that is unknown, not installed, or cannot be loaded.
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
    """Make a run's pictures, score them, and treat flagged pictures as `screening` says.

    Each report gains `flagged`, `scores` and `screening` (see docs/scorers.md). For a withheld
    picture, `images` has a plain grey picture and `edit_maps` has zeros. For a blurred or withheld
    picture, `latents` has zeros, because the sharp picture could be decoded from latents.

    Args:
        make: makes a run's pictures.
        run: the run.
        screening: from `screening_under`.

    Raises:
        InputError: a rule that names a score no scorer gives.
        UserError: the run or a scorer failed.
    """
    result = make(run)
    verdicts = _judge(result, run.images, screening)
    attempts = [
        [_attempt(image, verdict, report)]
        for image, verdict, report in zip(run.images, verdicts, result.reports, strict=True)
    ]
    places = [
        place
        for place, verdict in enumerate(verdicts)
        if verdict.flagged and run.images[place].preset != STRONGEST
    ]
    if places and screening.on_flag in _ESCALATES:
        images = [escalated(run.images[place], calls=run.table.calls) for place in places]
        part = make(replace(run, images=tuple(images)))
        part_verdicts = _judge(part, images, screening)
        for index, (place, verdict) in enumerate(zip(places, part_verdicts, strict=True)):
            verdicts[place] = verdict
            attempts[place].append(_attempt(images[index], verdict, part.reports[index]))
        result = _with(result, part, places)
    return _finished(result, verdicts, attempts, screening)


def escalated(image: ImageRun, *, calls: int) -> ImageRun:
    """Return an image with the strongest preset and the same prompt, concept and seed."""
    safety = safety_from_preset(STRONGEST, calls=calls, concept=image.safety.concept)
    return replace(image, preset=STRONGEST, safety=safety)


def _judge(result: Result, images: Sequence[ImageRun], screening: Screening) -> list[Verdict]:
    pictures = np.stack([np.asarray(image) for image in result.images])
    scores = score_pictures(
        screening.scorers, pictures, [image.prompt for image in images], result.reports
    )
    return [Verdict(scores=each, flagged=flagged(each, screening.rule)) for each in scores]


def _attempt(image: ImageRun, verdict: Verdict, report: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "preset": image.preset,
        "mean_share": report["safety"]["mean_share"],
        "scores": dict(verdict.scores),
        "flagged": verdict.flagged,
    }


def _with(result: Result, part: Result, places: Sequence[int]) -> Result:
    """Replace the pictures at `places` by those of `part`."""
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
    """Return the treatment of a picture: "nothing", "blurred", "withheld" or "escalated"."""
    if verdict.flagged and screening.on_flag == "blur":
        return "blurred"
    if verdict.flagged and screening.on_flag in ("withhold", "escalate-withhold"):
        return "withheld"
    return "escalated" if len(attempts) > 1 else "nothing"
