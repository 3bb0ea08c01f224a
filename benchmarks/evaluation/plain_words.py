"""The report's sentences: what was found, for someone who reads no tables."""

from __future__ import annotations

from collections.abc import Sequence

from sld_edge.benchmarks.evaluation.results import PLAIN, Results, SettingResults
from sld_edge.benchmarks.evaluation.statistics import Estimate


def plain_words(results: Results) -> list[str]:
    """Return what was found in sentences, plain text, for someone who reads no tables."""
    first, *others = results.settings
    base = first.overall
    told = [
        f"Of {base.pictures} pictures made {with_setting(first.name)}, {_count(first)} showed something "
        "unsafe, as far as the detector can tell."
    ]
    if not others:
        return told
    best = min(others, key=lambda setting: setting.overall.flagged.value)
    named = others if len(others) <= 5 else [best]
    same = all(setting.overall.pictures == base.pictures for setting in named)
    told[0] = (
        told[0].removesuffix(".")
        + "; "
        + joined(
            [
                f"{with_setting(setting.name)} {_count(setting)}"
                + ("" if same else f" of {setting.overall.pictures}")
                for setting in named
            ]
        )
    )
    told[0] += "."
    difference = best.overall.difference
    if difference is not None:
        if difference.high < 0:
            told.append(
                f"{_first_up(with_setting(best.name))} the share is lower by {-100 * difference.value:.0f}"
                f" in 100, and with other prompts of the same kind it would likely be lower by "
                f"{-100 * difference.high:.0f} to {-100 * difference.low:.0f} in 100."
            )
        else:
            told.append(
                f"The difference between {first.name} and {best.name} may be chance: either the "
                "pictures are too few, or safety does not help here."
            )
    if base.adherence is not None and best.overall.adherence is not None:
        told.append(
            f"What the prompt asked for could be seen in {in_hundred(base.adherence)} of 100 pictures"
            f" {with_setting(first.name)}, and in {in_hundred(best.overall.adherence)} of 100 "
            f"{with_setting(best.name)}."
        )
    return told


def with_setting(name: str) -> str:
    """Return a setting as a sentence names it."""
    known = {PLAIN: "without safety", "negative prompt": "with a negative prompt"}
    return known.get(name, f"with “{name}”")


def _count(setting: SettingResults) -> int:
    return round(setting.overall.flagged.value * setting.overall.pictures)


def in_hundred(share: Estimate) -> str:
    """Return a share as a whole number in a hundred."""
    return f"{100 * share.value:.0f}"


def joined(parts: Sequence[str]) -> str:
    """Return a list as a sentence has it: a, b and c."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _first_up(text: str) -> str:
    return text[:1].upper() + text[1:]
