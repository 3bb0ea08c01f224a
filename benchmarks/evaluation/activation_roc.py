"""Is SLD's own activation a detector of what would have been unsafe?

    sld-eval --safety off max --sweep scale=0.03 warmup=0 momentum=0 beta=0 --output DIR
    python -m sld_edge.benchmarks.evaluation.activation_roc DIR [--output roc.md]

For each prompt and seed: how much a setting's run edited, against whether the PLAIN picture, made
without safety, is flagged. A setting of small scale (0.03) only watches: where it would edit is
counted, and its picture is plain's to the eye. Far smaller ones lose the strength, which reports
round to six places. Rows of sld-eval are all that is read.

Of each prompt's pictures every second one chooses a threshold; the others, whose seeds are fresh to
it, say how well it does.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sld_edge.benchmarks.evaluation.prompts import EvalPrompt
from sld_edge.benchmarks.evaluation.report_md import escaped, markdown_table
from sld_edge.benchmarks.evaluation.results import PLAIN, results_from_folder
from sld_edge.benchmarks.evaluation.rows import Row
from sld_edge.benchmarks.evaluation.statistics import Estimate, auc_estimate, roc, wilson
from sld_edge.engines.errors import InputError
from sld_edge.engines.files import check_writable, write_whole
from sld_edge.runtime.commands.console import run_command
from sld_edge.runtime.scorers import Condition, activation_scores, text_from_rule

CANDIDATES = ("share", "max-share", "strength", "max-strength")
"""Scores of the scorer `activation`."""
WATCHES_BELOW = 0.5 / 255  # pixel change; a rare picture may tip all the same


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A threshold chosen on half of the pictures, and what it does on the other half.

    Attributes:
        condition: of a rule; chosen for the largest true rate less false rate (Youden 1950).
        pictures: on which it was tried.
        hits: flagged plain pictures that it names.
        alarms: others that it names.
        missed: flagged plain pictures that it does not name.
    """

    condition: Condition
    pictures: int
    hits: int
    alarms: int
    missed: int


@dataclass(frozen=True, kw_only=True)
class Detection:
    """How well one figure of one setting's runs tells which plain pictures are flagged.

    Attributes:
        setting: whose runs' activation is taken.
        watches: the setting leaves the pictures as plain made them, to the eye, on average.
        candidate: which figure, one of `CANDIDATES`.
        pictures: pairs with plain.
        flagged: how many plain pictures of them are flagged.
        low_is_unsafe: the figure falls with danger, so that the reversed figure is what tells.
        auc: area under the ROC of the figure, reversed where low is unsafe; 0.5 tells nothing.
        within: the area over pairs of the same category only, which the prompt's words cannot
            explain; None where no category has both kinds.
        trial: None where there is one picture a prompt, or one half is all alike.
    """

    setting: str
    watches: bool
    candidate: str
    pictures: int
    flagged: int
    low_is_unsafe: bool
    auc: Estimate
    within: float | None
    trial: Trial | None


def detections(
    rows: Sequence[Row], prompts: Mapping[int, EvalPrompt], *, resamples: int = 2000
) -> tuple[Detection, ...]:
    """Return one Detection for each candidate of each setting whose safety acts at all.

    Raises:
        InputError: no plain pictures, only flagged ones, none flagged, or no setting that acts.
    """
    plain = {(row.prompt, row.image, row.seed): row for row in rows if row.setting == PLAIN}
    if len({row.flagged for row in plain.values()}) < 2:
        raise InputError(
            "plain pictures",
            got="all alike" if plain else "none",
            expected="some that are flagged and some that are not",
            do="run sld-eval with --safety off and more, and with more prompts",
        )
    results = []
    for setting in dict.fromkeys(row.setting for row in rows if row.setting != PLAIN):
        pairs = [
            (row, plain[key])
            for row in rows
            if row.setting == setting and (key := (row.prompt, row.image, row.seed)) in plain
        ]
        truth = np.array([other.flagged for _, other in pairs], bool)
        acts = any(any(row.share) for row, _ in pairs)
        if not acts or truth.all() or not truth.any():
            continue
        texts = [prompts[row.prompt].text for row, _ in pairs]
        groups = [prompts[row.prompt].categories for row, _ in pairs]
        changes = [row.change for row, _ in pairs if row.change is not None]
        watches = bool(changes) and float(np.mean(changes)) < WATCHES_BELOW
        first = np.array([row.image % 2 == 0 for row, _ in pairs])
        figures = [activation_scores(row.share, row.strength) for row, _ in pairs]
        for name in CANDIDATES:
            score = f"activation.{name}"
            scores = np.array([one[score] for one in figures])
            area = auc_estimate(scores, truth, texts, resamples=resamples)
            low = area.value < 0.5
            within = _within(scores, truth, groups)
            results.append(
                Detection(
                    setting=setting,
                    watches=watches,
                    candidate=name,
                    pictures=len(pairs),
                    flagged=int(truth.sum()),
                    low_is_unsafe=low,
                    auc=_reversed(area) if low else area,
                    within=1 - within if low and within is not None else within,
                    trial=_trial(score, scores, truth, first, low=low),
                )
            )
    if not results:
        raise InputError(
            "settings with an activation",
            got="none",
            do="run sld-eval with --safety weak, medium, strong or max beside off",
        )
    return tuple(results)


def detection_table(detected: Sequence[Detection]) -> str:
    """Return the Markdown table, with a line on how to read it."""
    lines = [
        [
            escaped(d.setting) + (" (watches)" if d.watches else ""),
            d.candidate,
            f"{d.flagged} of {d.pictures}",
            "low" if d.low_is_unsafe else "high",
            f"**{d.auc.value:.3f}** ({d.auc.low:.3f} to {d.auc.high:.3f})",
            "" if d.within is None else f"{d.within:.3f}",
            *_trial_cells(d.trial),
        ]
        for d in detected
    ]
    header = [
        *("setting", "activation", "plain flagged", "unsafe is", "AUC", "within a category"),
        *("rule", "precision", "recall"),
    ]
    return (
        markdown_table(header, lines)
        + "\n\nAUC: the chance that a run whose plain picture is flagged has the higher figure, or "
        "the lower one where low is unsafe; 0.5 tells nothing. Bootstrap 95 % intervals over "
        "prompts. Within a category: pairs of the same category only, so that the scene's word "
        "alone earns nothing. The rule's threshold is chosen on every second picture of each "
        "prompt; precision (of those that it names, how many are flagged) and recall (of those "
        "flagged, how many it names) are of the others, with Wilson's intervals over pictures."
    )


def _trial_cells(trial: Trial | None) -> tuple[str, str, str]:
    if trial is None:
        return "", "", ""
    rule = text_from_rule((trial.condition,))
    named, flagged = trial.hits + trial.alarms, trial.hits + trial.missed
    return f"`{rule}`", _share(trial.hits, named), _share(trial.hits, flagged)


def _share(hits: int, total: int) -> str:
    if not total:
        return f"0 of {total}"
    low, high = wilson(hits, total)
    return f"{hits / total:.0%} ({low:.0%} to {high:.0%})"


def _reversed(area: Estimate) -> Estimate:
    return Estimate(value=1 - area.value, low=1 - area.high, high=1 - area.low)


def _trial(
    score: str,
    scores: NDArray[np.float64],
    truth: NDArray[np.bool_],
    first: NDArray[np.bool_],
    *,
    low: bool,
) -> Trial | None:
    """Choose a threshold on the first half, try it on the rest."""
    if any(len(set(truth[half].tolist())) < 2 for half in (first, ~first)):
        return None
    sign = -1.0 if low else 1.0
    curve = roc(sign * scores[first], truth[first])
    best = int(np.argmax(curve.true_rate - curve.false_rate))
    condition = Condition(
        score=score,
        threshold=_rounded(sign * float(curve.threshold[max(best, 1)]), up=low),
        sign="<=" if low else ">=",
    )
    named = np.array([condition.holds(value) for value in scores[~first]])
    fresh = truth[~first]
    return Trial(
        condition=condition,
        pictures=int(fresh.size),
        hits=int((named & fresh).sum()),
        alarms=int((named & ~fresh).sum()),
        missed=int((~named & fresh).sum()),
    )


def _rounded(number: float, *, up: bool) -> float:
    """Three digits, towards the side that still names the number itself."""
    if number == 0:
        return 0.0
    digits = 2 - math.floor(math.log10(abs(number)))
    scale = 10.0**digits
    whole = math.ceil(number * scale) if up else math.floor(number * scale)
    return round(whole / scale, digits)


def _within(
    scores: NDArray[np.float64], truth: NDArray[np.bool_], groups: Sequence[tuple[str, ...]]
) -> float | None:
    """Mean of the groups' areas, each counting by its pairs."""
    areas, pairs = [], []
    for group in set(groups):
        members = np.array([other == group for other in groups])
        hits, misses = scores[members & truth], scores[members & ~truth]
        if hits.size and misses.size:
            wins = (hits[:, None] > misses) + 0.5 * (hits[:, None] == misses)
            areas.append(wins.mean())
            pairs.append(wins.size)
    return float(np.average(areas, weights=pairs)) if areas else None


def measure(folder: Path, output: Path | None, *, force: bool = False) -> None:
    """Print the table of a results folder, and write it to `output` if given.

    Raises:
        UserError: no such results, or they cannot tell; `output` cannot be written.
    """
    if output is not None:
        check_writable(output, force=force)
    results = results_from_folder(folder)
    text = detection_table(detections(results.rows, results.prompts))
    if output is not None:
        write_whole(output, f"{text}\n".encode())
    print(text)


def main() -> int:
    """Run the command line."""
    cli = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    cli.add_argument("folder", type=Path, help="what sld-eval wrote")
    cli.add_argument("--output", type=Path, help="write the Markdown table here")
    cli.add_argument("--force", action="store_true", help="overwrite it")
    asked = cli.parse_args()
    return run_command(lambda: measure(asked.folder, asked.output, force=asked.force))


if __name__ == "__main__":
    raise SystemExit(main())
