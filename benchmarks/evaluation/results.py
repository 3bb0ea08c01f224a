"""From a results folder's rows to figures: overall and per category, setting by setting."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sld_edge.benchmarks.evaluation.manifest import FILE as MANIFEST
from sld_edge.benchmarks.evaluation.manifest import prompts_from_manifest, read_manifest
from sld_edge.benchmarks.evaluation.prompts import EvalPrompt
from sld_edge.benchmarks.evaluation.published import Published, published_for
from sld_edge.benchmarks.evaluation.rows import Row, read_rows
from sld_edge.benchmarks.evaluation.settings import MINIATURE_SCORERS
from sld_edge.benchmarks.evaluation.settings import PLAIN as PLAIN_SETTING
from sld_edge.benchmarks.evaluation.statistics import (
    Estimate,
    Spread,
    difference_estimate,
    expected_maximum,
    mcnemar,
    mean_estimate,
    pareto_front,
)
from sld_edge.engines.errors import InputError, one_line
from sld_edge.runtime.scorers import DEFAULT_RULES, flagged

PLAIN = PLAIN_SETTING.name
FORMAT, FORMAT_VERSION = "sld-edge-evaluation", 1
Members = np.ndarray[Any, Any]
"""For each row the number of its prompt."""
# Traits that two runs must share to stand in one table, from their manifests.
_SAME: Mapping[str, Callable[[Mapping[str, Any]], Any]] = {
    "detectors": lambda manifest: manifest["scorers"],
    "rule": lambda manifest: manifest["rule"],
    "prompts": lambda manifest: manifest["prompts"]["list"],
    "protocol": lambda manifest: (manifest["protocol"], manifest["images_per_prompt"]),
}


@dataclass(frozen=True, kw_only=True)
class ConceptSummary:
    """How strongly safety steered away from one concept.

    Attributes:
        strength: of the concept's own edit, mean over pictures and calls.
        strongest: share of the pictures in which no other concept was stronger.
    """

    strength: Estimate
    strongest: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The figures of a setting on a group of pictures. Intervals are over prompts, 95 %.

    Attributes:
        prompts: distinct prompts.
        pictures: pictures made.
        flagged: share of pictures that the rule flags, the inappropriate probability.
        expected_maximum: highest percentage of flagged pictures among 25 prompts, expected.
        difference: flagged share minus plain's, on the same prompts and seeds; None for plain.
        p: exact McNemar test of that difference; None for plain.
        adherence: share of pictures that follow the prompt; None without a scorer of it.
        change: mean pixel difference to plain's picture, 0 to 1; None where there is none.
        left: share of flagged pictures among those whose plain picture is flagged; None if none is.
        left_of: number of those pictures.
        price: UNet branches of a picture relative to plain's; None where they are not known.
        seconds: mean per picture.
        scores: mean of each score.
        share: mean per UNet call of the latent's share that safety edited.
        strength: mean per UNet call of the edit's norm, relative to the guided prediction's.
        concepts: the safety concepts, in the order of the command line; none with safety off.
    """

    prompts: int
    pictures: int
    flagged: Estimate
    expected_maximum: Spread
    difference: Estimate | None
    p: float | None
    adherence: Estimate | None
    change: Estimate | None
    left: Estimate | None
    left_of: int
    price: Estimate | None
    seconds: Estimate
    scores: Mapping[str, Estimate]
    share: tuple[float, ...]
    strength: tuple[float, ...]
    concepts: Mapping[str, ConceptSummary]

    @property
    def gain(self) -> Estimate | None:
        """The measure that safety lowers: adherence, or else CLIP's score."""
        return self.adherence if self.adherence is not None else self.scores.get("clip-score")


@dataclass(frozen=True, kw_only=True)
class SettingResults:
    """One setting's figures.

    Attributes:
        name: of the setting.
        overall: figures of all pictures.
        hard: figures of hard prompts; None if the list marks none or all as hard.
        categories: figures of each category.
        on_front: no other setting is both safer and more adherent.
    """

    name: str
    overall: Summary
    hard: Summary | None
    categories: Mapping[str, Summary]
    on_front: bool


@dataclass(frozen=True, kw_only=True)
class Results:
    """A whole run's figures, with their rows and manifest.

    Attributes:
        manifest: the run's manifest, as it was written.
        model: the bundle's model id.
        rule: when a picture is flagged, in words.
        settings: in the manifest's order.
        categories: names of categories with pictures, in the prompt list's order.
        suites: names of the run's suites, which are categories too; none without --suite.
        published: figures of the paper, where they are comparable.
        missing: pictures that are not made yet.
        notes: for the reader, such as missing pictures.
        prompts: the prompts by index.
        rows: one a picture.
    """

    manifest: Mapping[str, Any]
    model: str
    rule: str
    settings: tuple[SettingResults, ...]
    categories: tuple[str, ...]
    suites: tuple[str, ...]
    published: Published | None
    missing: int
    notes: tuple[str, ...]
    prompts: Mapping[int, EvalPrompt]
    rows: tuple[Row, ...]


def results_from_rows(
    rows: Sequence[Row],
    prompts: Mapping[int, EvalPrompt],
    *,
    manifest: Mapping[str, Any],
    model: str,
    rule: str,
    order: Sequence[str],
    images_per_prompt: int,
) -> Results:
    """Return the figures of `rows`, the settings in `order`.

    Raises:
        InputError: no rows, or rows of prompts or settings that the run does not have.
    """
    if not rows:
        raise InputError("results", got="no pictures", do="let sld-eval make some first")
    strangers = {str(row.prompt) for row in rows if row.prompt not in prompts}
    strangers |= {row.setting for row in rows if row.setting not in order}
    if strangers:
        raise InputError(
            "rows of another run",
            got=", ".join(sorted(strangers)[:5]),
            expected="the prompts and settings of manifest.json",
        )
    rows = sorted(rows, key=lambda row: (order.index(row.setting), row.prompt, row.image))
    met = {row.prompt for row in rows}
    names = dict.fromkeys(
        name for index, p in prompts.items() if index in met for name in p.categories
    )
    plain = {(row.prompt, row.image, row.seed): row for row in rows if row.setting == PLAIN}
    by_setting: dict[str, list[Row]] = {}
    for row in rows:
        by_setting.setdefault(row.setting, []).append(row)

    summary = partial(_summary, prompts=prompts, plain=plain)
    overall = {name: summary(members) for name, members in by_setting.items()}
    front = _front(overall)
    settings = []
    for setting, members in by_setting.items():
        hard = [row for row in members if prompts[row.prompt].hard]
        parts = {
            name: [row for row in members if name in prompts[row.prompt].categories]
            for name in names
        }
        settings.append(
            SettingResults(
                name=setting,
                overall=overall[setting],
                hard=summary(hard) if 0 < len(hard) < len(members) else None,
                categories={name: summary(part) for name, part in parts.items() if part},
                on_front=setting in front,
            )
        )
    wanted = len(prompts) * len(order) * images_per_prompt
    return Results(
        manifest=manifest,
        model=model,
        rule=rule,
        settings=tuple(settings),
        categories=tuple(names),
        suites=tuple(name for name in _suites(manifest) if name in names),
        published=published_for(model, names),
        missing=wanted - len(rows),
        notes=tuple(_notes(rows, wanted, manifest)),
        prompts=prompts,
        rows=tuple(rows),
    )


def _summary(
    rows: Sequence[Row],
    prompts: Mapping[int, EvalPrompt],
    plain: Mapping[tuple[int, int, int], Row],
) -> Summary:
    """Summarise one setting's rows; `plain` by prompt, image and seed.

    Prompts with the same text are one prompt, as I2P counts them.
    """
    texts = [prompts[row.prompt].text for row in rows]
    flags = np.array([row.flagged for row in rows])
    _, members = np.unique(texts, return_inverse=True)
    percentages = 100 * np.bincount(members, flags) / np.bincount(members)
    pairs = [plain.get((row.prompt, row.image, row.seed)) for row in rows]
    there = np.array([other is not None for other in pairs])
    theirs = np.array([other is not None and other.flagged for other in pairs])
    compared = there.any() and rows[0].setting != PLAIN
    scores = {
        name: _known([row.scores.get(name) for row in rows], members)
        for name in sorted({name for row in rows for name in row.scores})
    }
    return Summary(
        prompts=len(percentages),
        pictures=len(rows),
        flagged=mean_estimate(flags, members),
        expected_maximum=expected_maximum(percentages),
        difference=difference_estimate(flags[there], theirs[there], members[there])
        if compared
        else None,
        p=mcnemar(flags[there], theirs[there]) if compared else None,
        adherence=_known([row.adherent for row in rows], members),
        change=_known([row.change for row in rows], members),
        left=mean_estimate(flags[theirs], members[theirs]) if theirs.any() else None,
        left_of=int(theirs.sum()),
        price=_known([_price(row, other) for row, other in zip(rows, pairs, strict=True)], members),
        seconds=mean_estimate([row.seconds for row in rows], members),
        scores={name: score for name, score in scores.items() if score is not None},
        share=_curve([row.share for row in rows]),
        strength=_curve([row.strength for row in rows]),
        concepts=_concept_summaries(rows, members),
    )


def _price(row: Row, plain: Row | None) -> float | None:
    if plain is None or row.branches is None or not plain.branches:
        return None
    return row.branches / plain.branches


def _concept_summaries(rows: Sequence[Row], members: Members) -> dict[str, ConceptSummary]:
    summaries = {}
    strengths = [dict(zip(row.concepts, row.concept_strength, strict=True)) for row in rows]
    for concept in dict.fromkeys(name for row in rows for name in row.concepts):
        strength = _known([by_concept.get(concept) for by_concept in strengths], members)
        most = np.mean([row.strongest_concept == concept for row in rows])
        if strength is not None:
            summaries[concept] = ConceptSummary(strength=strength, strongest=float(most))
    return summaries


def _known(values: Sequence[float | None], members: Members) -> Estimate | None:
    """Mean of the known values."""
    there = np.array([value is not None for value in values])
    if not there.any():
        return None
    return mean_estimate([v for v in values if v is not None], members[there])


def _curve(runs: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Mean call by call; nothing where runs differ in length."""
    if len({len(run) for run in runs}) != 1:
        return ()
    return tuple(float(value) for value in np.mean(np.asarray(runs, np.float64), axis=0))


def _front(summaries: Mapping[str, Summary]) -> set[str]:
    """Settings that no other beats in flagged share and in adherence."""
    known = [(name, s.flagged.value, s.gain.value) for name, s in summaries.items() if s.gain]
    chosen = pareto_front([cost for _, cost, _ in known], [gain for _, _, gain in known])
    return {name for (name, _, _), stands in zip(known, chosen, strict=True) if stands}


def _suites(manifest: Mapping[str, Any]) -> Sequence[str]:
    """Return the suites that a run was asked for; an empty sequence without them."""
    suites: Sequence[str] = manifest.get("prompts", {}).get("choice", {}).get("suites", ())
    return suites


def _notes(rows: Sequence[Row], wanted: int, manifest: Mapping[str, Any]) -> list[str]:
    """Return notes for the reader: missing pictures, and detectors that disagree."""
    notes = []
    if len(rows) < wanted:
        notes.append(f"Not finished: {len(rows)} of {wanted} pictures are in these figures.")
    if all(row.setting != PLAIN for row in rows):
        notes.append("Without the plain setting there is no difference to it.")
    if _suites(manifest):
        notes.append("Figures over all prompts mix the suites: read the suites one by one.")
    return notes + _disagreement(rows)


def _disagreement(rows: Sequence[Row]) -> list[str]:
    """Say how often the miniature's two networks disagree about the flag."""
    rules = {name: (DEFAULT_RULES[name],) for name in MINIATURE_SCORERS}
    both = [r for r in rows if all(rule[0].score in r.scores for rule in rules.values())]
    flags = [[flagged(row.scores, rule) for row in both] for rule in rules.values()]
    first, second = (np.array(flag, bool) for flag in flags)
    if not both:
        return []
    differing = int((first != second).sum())
    return [
        f"{' and '.join(rules)} disagree about the flag in {differing} of {len(both)} pictures "
        f"({differing / len(both):.1%}): {int((first & ~second).sum())} are flagged by the first "
        f"alone, {int((second & ~first).sum())} by the second alone."
    ]


def results_from_folder(folder: Path) -> Results:
    """Return the figures of a results folder as it stands, finished or not.

    Raises:
        InputError: not a results folder, or rows that do not belong to it.
    """
    manifest = read_manifest(folder)
    prompts = prompts_from_manifest(manifest)
    try:
        facts: dict[str, Any] = {
            "model": manifest["bundle"]["model"],
            "rule": manifest["rule"],
            "order": [setting["name"] for setting in manifest["settings"]],
            "images_per_prompt": manifest["images_per_prompt"],
        }
        for trait in _SAME.values():
            trait(manifest)
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / MANIFEST} is damaged", got=f"no {one_line(error)}") from error
    return results_from_rows(
        read_rows(folder),
        {prompt.index: prompt for prompt in prompts},
        manifest=manifest,
        **facts,
    )


def json_from_results(results: Results) -> str:
    """Return the figures as JSON, with the manifest and without prompts and rows."""
    manifest = dict(results.manifest)
    if "prompts" in manifest:
        manifest["prompts"] = {k: v for k, v in manifest["prompts"].items() if k != "list"}
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": results.model,
        "rule": results.rule,
        "notes": results.notes,
        "suites": results.suites,
        "settings": [asdict(setting) for setting in results.settings],
        "published": None if results.published is None else asdict(results.published),
        "manifest": manifest,
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def compare_results(folders: Sequence[Path], *, force: bool = False) -> dict[str, Results]:
    """Read several runs for one table (`comparison_table`), by their folders' names.

    Raises:
        InputError: runs that differ in detectors, rule, prompts or protocol, unless forced; fewer
            than two.
    """
    if len({folder.resolve() for folder in folders}) < 2:
        raise InputError("runs to compare", got=len(folders), expected="two or more folders")
    runs = {str(folder): results_from_folder(folder) for folder in folders}
    (first, reference), *others = runs.items()
    for name, run in others:
        traits = _SAME.items()
        differing = [what for what, of in traits if of(run.manifest) != of(reference.manifest)]
        if differing and not force:
            raise InputError(
                f"{name} and {first} do not belong in one table",
                got="other " + ", other ".join(differing),
                expected="the same detectors, rule, prompts and protocol",
                do="compare them anyway with --force-compare",
            )
    return runs
