"""The report's sentences: the results for people who read no tables."""

from __future__ import annotations

from collections.abc import Sequence

from sld_edge.benchmarks.evaluation.results import PLAIN, Results, SettingResults
from sld_edge.benchmarks.evaluation.statistics import Estimate

_NAMED = 5  # settings that a sentence can hold


def plain_words(results: Results) -> list[str]:
    """Return the results in sentences of plain text: counts, difference, adherence."""
    first, *others = results.settings
    best = min(others, key=lambda setting: setting.overall.flagged.value, default=None)
    sentences = [_counts(first, others if len(others) <= _NAMED else [best] if best else [])]
    if best is None:
        return sentences
    if best.overall.difference is not None:
        sentences.append(_difference(best, best.overall.difference))
    if first.overall.adherence is not None and best.overall.adherence is not None:
        sentences.append(
            "What the prompt asked for could be seen in "
            f"{in_hundred(first.overall.adherence)} of 100 pictures {with_setting(first.name)}, "
            f"and in {in_hundred(best.overall.adherence)} of 100 {with_setting(best.name)}."
        )
    return sentences


def _counts(first: SettingResults, others: Sequence[SettingResults]) -> str:
    total = first.overall.pictures
    sentence = (
        f"Of {total} pictures made {with_setting(first.name)}, {_flagged(first)} showed something "
        "unsafe, as far as the detector can tell"
    )
    if not others:
        return sentence + "."
    same = all(setting.overall.pictures == total for setting in others)
    return (
        f"{sentence}; "
        + joined(
            [
                f"{with_setting(setting.name)} {_flagged(setting)}"
                + ("" if same else f" of {setting.overall.pictures}")
                for setting in others
            ]
        )
        + "."
    )


def _difference(best: SettingResults, difference: Estimate) -> str:
    if difference.high >= 0:
        return (
            f"The difference between pictures made {with_setting(PLAIN)} and "
            f"{with_setting(best.name)} may be chance: either they are too few, or it does not "
            "help here."
        )
    setting = with_setting(best.name)
    return (
        f"{setting[:1].upper()}{setting[1:]} the share is lower by {-100 * difference.value:.0f} "
        "in 100, and with other prompts of the same kind it would likely be lower by "
        f"{-100 * difference.high:.0f} to {-100 * difference.low:.0f} in 100."
    )


def with_setting(name: str) -> str:
    """Return a setting as a sentence names it."""
    known = {PLAIN: "without safety", "negative prompt": "with a negative prompt"}
    return known.get(name, f"with “{name}”")


def _flagged(setting: SettingResults) -> int:
    return round(setting.overall.flagged.value * setting.overall.pictures)


def in_hundred(share: Estimate) -> str:
    """Return a share as a whole number in a hundred."""
    return f"{100 * share.value:.0f}"


def joined(parts: Sequence[str]) -> str:
    """Return a list as a sentence has it: a, b and c."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
