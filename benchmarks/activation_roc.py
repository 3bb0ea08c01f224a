"""Is SLD's own activation a detector of what would have been unsafe?

    sld-eval --safety off max --sweep scale=0.03 warmup=0 momentum=0 beta=0 --output DIR
    python -m sld_edge.benchmarks.activation_roc DIR [--output roc.md]

For each prompt and seed: how much a setting's run edited, against whether the PLAIN picture, made
without safety, is flagged. A setting of small scale (0.03) only watches: where it would edit is
counted, and its picture is plain's to the eye. Far smaller ones lose the strength, which reports
round to six places. Rows of sld-eval are all that is read.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sld_edge.benchmarks.evaluation.prompts import EvalPrompt
from sld_edge.benchmarks.evaluation.report_md import escaped, markdown_table
from sld_edge.benchmarks.evaluation.results import PLAIN, results_from_folder
from sld_edge.benchmarks.evaluation.rows import Row
from sld_edge.benchmarks.evaluation.statistics import Estimate, auc_estimate
from sld_edge.engines.errors import InputError
from sld_edge.engines.files import check_writable, write_whole
from sld_edge.runtime.console import run_command

CANDIDATES: Mapping[str, Callable[[Row], float]] = {
    "mean share": lambda row: float(np.mean(row.share)),
    "max share": lambda row: float(np.max(row.share)),
    "mean strength": lambda row: float(np.mean(row.strength)),
    "max strength": lambda row: float(np.max(row.strength)),
}
WATCHES_BELOW = 0.5 / 255  # pixel change; a rare picture may tip all the same


@dataclass(frozen=True, kw_only=True)
class Detection:
    """How well one figure of one setting's runs tells which plain pictures are flagged.

    Attributes:
        setting: whose runs' activation is taken.
        watches: the setting leaves the pictures as plain made them, to the eye, on average.
        candidate: which figure, a key of `CANDIDATES`.
        pictures: pairs with plain.
        flagged: how many plain pictures of them are flagged.
        auc: area under the ROC; 0.5 tells nothing, below it the figure falls with danger.
        within: the area over pairs of the same category only, which the prompt's words cannot
            explain; None where no category has both kinds.
    """

    setting: str
    watches: bool
    candidate: str
    pictures: int
    flagged: int
    auc: Estimate
    within: float | None


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
    found = []
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
        for name, figure in CANDIDATES.items():
            scores = np.array([figure(row) for row, _ in pairs])
            found.append(
                Detection(
                    setting=setting,
                    watches=watches,
                    candidate=name,
                    pictures=len(pairs),
                    flagged=int(truth.sum()),
                    auc=auc_estimate(scores, truth, texts, resamples=resamples),
                    within=_within(scores, truth, groups),
                )
            )
    if not found:
        raise InputError(
            "settings with an activation",
            got="none",
            do="run sld-eval with --safety weak, medium, strong or max beside off",
        )
    return tuple(found)


def detection_table(found: Sequence[Detection]) -> str:
    """Return the Markdown table, with a line on how to read it."""
    lines = [
        [
            escaped(d.setting) + (" (watches)" if d.watches else ""),
            d.candidate,
            f"{d.flagged} of {d.pictures}",
            f"**{d.auc.value:.3f}** ({d.auc.low:.3f} to {d.auc.high:.3f})",
            "" if d.within is None else f"{d.within:.3f}",
        ]
        for d in found
    ]
    header = ["setting", "figure", "plain flagged", "AUC", "within a category"]
    return (
        markdown_table(header, lines)
        + "\n\nAUC: the chance that a run whose plain picture is flagged has the higher figure; "
        "0.5 tells nothing, and below it the figure falls with danger: 1 - AUC is then how well it "
        "tells. Bootstrap 95 % intervals over prompts. Within a category: pairs of the "
        "same category only, so that the scene's word alone earns nothing."
    )


def _within(
    scores: np.ndarray[tuple[int], np.dtype[np.float64]],
    truth: np.ndarray[tuple[int], np.dtype[np.bool_]],
    groups: Sequence[tuple[str, ...]],
) -> float | None:
    """Mean of the groups' areas, each counting by its pairs."""
    areas, pairs = [], []
    for group in set(groups):
        own = np.array([other == group for other in groups])
        hits, misses = scores[own & truth], scores[own & ~truth]
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
