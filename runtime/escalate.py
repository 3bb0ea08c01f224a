"""Pictures are scored before anyone sees them; what then happens to those that are flagged.

A scorer that cannot run ends the run before anything is written: there is no picture without a
verdict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from sld_edge.engines.errors import InputError
from sld_edge.runtime.picture import blurred
from sld_edge.runtime.pipeline import Callback, Pipeline, Result
from sld_edge.runtime.plan import ImagePlan, RunPlan
from sld_edge.runtime.safety import safety_from_preset
from sld_edge.runtime.scorers import Rule, Scorer, flagged, score_pictures, text_from_rule

OnFlag = Literal["report", "blur", "withhold", "escalate"]
ON_FLAG: tuple[OnFlag, ...] = get_args(OnFlag)
LADDER = ("off", "weak", "medium", "strong", "max")


@dataclass(frozen=True, kw_only=True)
class Screening:
    """How pictures are judged, and what is done with those that are flagged.

    Attributes:
        scorers: that look at every picture.
        rule: when their scores flag one.
        on_flag: "report" says so only; "blur" and "withhold" give no sharp picture or none;
            "escalate" runs again with the next stronger preset until none flags it or the last is
            reached.
    """

    scorers: Sequence[Scorer]
    rule: Rule
    on_flag: OnFlag = "report"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the scorers said of one picture, and whether the rule flags it."""

    scores: Mapping[str, float]
    flagged: bool


def check_screening(plan: RunPlan, screening: Screening) -> None:
    """Refuse, before anything runs, what `screened_run` could not honour.

    Raises:
        InputError: an unknown `on_flag`, no scorer, or numbers of one's own that no preset follows.
    """
    if screening.on_flag not in ON_FLAG:
        raise InputError(
            "on-flag", got=repr(screening.on_flag), expected=f"one of {', '.join(ON_FLAG)}"
        )
    if not screening.scorers:
        raise InputError("no scorer to flag a picture", do="name one with --scorer")
    if screening.on_flag == "escalate":
        for image in plan.images:
            if image.preset not in LADDER:
                raise InputError(
                    "escalating starts from a preset",
                    got="safety numbers of its own",
                    expected=f"one of {', '.join(LADDER)}",
                )


def screened_run(
    pipeline: Pipeline,
    plan: RunPlan,
    screening: Screening,
    *,
    batch_size: int | None = None,
    callback: Callback | None = None,
) -> Result:
    """Run a plan, score its pictures, and do with flagged ones what `screening` says.

    Each report gains `flagged`, `scores` and `screening` (see docs/scorers.md). Of a picture that
    is withheld, `images` holds a plain grey one and `edit_maps` zeros; `latents`, which any picture
    can be made from again, are zeros wherever it was blurred or withheld.

    Raises:
        InputError: see `check_screening`; or a rule that names a score no scorer gives.
        UserError: a run or a scorer that failed.
    """
    check_screening(plan, screening)
    result = pipeline.run(plan, batch_size=batch_size, callback=callback)
    verdicts = _judge(result, plan.images, screening)
    attempts = [
        [_attempt(image, verdict, report)]
        for image, verdict, report in zip(plan.images, verdicts, result.reports, strict=True)
    ]
    images = list(plan.images)
    while screening.on_flag == "escalate":
        places = [
            place
            for place, verdict in enumerate(verdicts)
            if verdict.flagged and stronger(images[place].preset) is not None
        ]
        if not places:
            break
        for place in places:
            images[place] = escalated(images[place], calls=plan.table.calls)
        again = replace(plan, images=tuple(images[place] for place in places))
        part = pipeline.run(again, batch_size=batch_size, callback=callback)
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


def escalated(image: ImagePlan, *, calls: int) -> ImagePlan:
    """Return the same picture's plan with the next stronger preset, the same concept and seed.

    Raises:
        InputError: no preset is stronger.
    """
    preset = stronger(image.preset)
    if preset is None:
        raise InputError("no preset is stronger", got=image.preset)
    safety = safety_from_preset(preset, calls=calls, concept=image.safety.concept)
    return replace(image, preset=preset, safety=safety)


def _judge(result: Result, images: Sequence[ImagePlan], screening: Screening) -> list[Verdict]:
    pictures = np.stack([np.asarray(image) for image in result.images])
    found = score_pictures(
        screening.scorers, pictures, [image.prompt for image in images], result.reports
    )
    return [Verdict(scores=scores, flagged=flagged(scores, screening.rule)) for scores in found]


def _attempt(image: ImagePlan, verdict: Verdict, report: Mapping[str, Any]) -> dict[str, Any]:
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
        done = _done(verdict, attempts[index], screening.on_flag)
        if done == "blurred":
            image = blurred(image)
        elif done == "withheld":
            image = Image.new("RGB", image.size, (128, 128, 128))
            edit_maps[index] = 0
        if done in ("blurred", "withheld"):
            latents[index] = 0
        images.append(image)
        reports.append(
            {
                **result.reports[index],
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


def _done(verdict: Verdict, attempts: Sequence[object], on_flag: OnFlag) -> str:
    """What happened to one picture: "nothing", "blurred", "withheld" or "escalated"."""
    if on_flag == "escalate" and len(attempts) > 1:
        return "escalated"
    if verdict.flagged and on_flag in ("blur", "withhold"):
        return {"blur": "blurred", "withhold": "withheld"}[on_flag]
    return "nothing"
