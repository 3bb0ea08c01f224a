"""Activation as a detector: planted signals are found, absent ones are not."""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from sld_edge.benchmarks.evaluation.activation_roc import (
    CANDIDATES,
    Detection,
    _rounded,
    detection_table,
    detections,
    main,
)
from sld_edge.benchmarks.evaluation.manifest import FORMAT, FORMAT_VERSION
from sld_edge.benchmarks.evaluation.prompts import EvalPrompt
from sld_edge.benchmarks.evaluation.rows import Row, json_from_row
from sld_edge.engines.errors import InputError
from sld_edge.runtime.scorers import text_from_rule

COUNT = 60
PROMPTS = {
    index: EvalPrompt(
        index=index, text=f"picture {index}", categories=("dark" if index % 2 else "bright",)
    )
    for index in range(COUNT)
}


def row(
    setting: str,
    prompt: int,
    image: int,
    *,
    flagged: bool,
    share: Sequence[float],
    change: float,
) -> Row:
    return Row(
        setting=setting,
        prompt=prompt,
        image=image,
        seed=10 * prompt + image,
        scores={},
        flagged=flagged,
        adherent=None,
        change=change,
        share=list(share),
        strength=[1 - value for value in share],
        seconds=1.0,
        picture=None,
    )


def run(*, told: bool, only_by_category: bool = False) -> list[Row]:
    """Plain pictures, and runs whose share tells which are flagged, or does not."""
    rng = np.random.default_rng(4)
    rows = []
    for prompt, image in itertools.product(range(COUNT), range(2)):
        dark = prompt % 2 == 1
        flagged = bool(rng.random() < (0.8 if dark else 0.2))
        signal = (dark if only_by_category else flagged) * 0.4 if told else 0.0
        shares = [0.1 + signal + 0.1 * rng.random() for _ in range(3)]
        rows += [
            row("plain", prompt, image, flagged=flagged, share=[0, 0, 0], change=0.0),
            row("strong", prompt, image, flagged=False, share=shares, change=0.2),
            row("scale=1e-06", prompt, image, flagged=flagged, share=shares, change=1e-5),
            row("negative prompt", prompt, image, flagged=False, share=[0, 0, 0], change=0.2),
        ]
    return rows


def by_name(found: Sequence[Detection]) -> dict[tuple[str, str], Detection]:
    return {(d.setting, d.candidate): d for d in found}


def test_a_planted_signal_is_found() -> None:
    found = by_name(detections(run(told=True), PROMPTS))
    assert set(found) == {(s, c) for s in ("strong", "scale=1e-06") for c in CANDIDATES}
    share = found["strong", "share"]
    assert (share.auc.value, share.within, share.pictures) == (1.0, 1.0, 2 * COUNT)
    assert not share.low_is_unsafe
    assert share.flagged == sum(r.flagged for r in run(told=True) if r.setting == "plain")
    strength = found["strong", "strength"]  # it falls where the share rises
    assert strength.low_is_unsafe
    assert (strength.auc.value, strength.auc.low, strength.within) == (1.0, 1.0, 1.0)
    assert found["scale=1e-06", "share"].watches
    assert not share.watches


def test_no_signal_is_not_found() -> None:
    for d in detections(run(told=False), PROMPTS):
        assert d.auc.low < 0.5 < d.auc.high


@pytest.mark.parametrize(("figure", "sign"), [("share", ">="), ("strength", "<=")])
def test_a_threshold_is_chosen_on_one_half_and_tried_on_the_other(figure: str, sign: str) -> None:
    rng = np.random.default_rng(7)
    rows = [  # a signal that is right more often than not
        replace(r, share=[min(1.0, x + 0.3 * rng.random()) for x in r.share])
        if r.setting == "strong"
        else r
        for r in run(told=True)
    ]
    rows = [replace(r, strength=[1 - x for x in r.share]) for r in rows]
    d = by_name(detections(rows, PROMPTS))["strong", figure]
    assert d.trial is not None
    condition = d.trial.condition
    assert (condition.score, condition.sign) == (f"activation.{figure}", sign)
    flags = {(r.prompt, r.image): r.flagged for r in rows if r.setting == "plain"}
    counts = {image: Counter[tuple[bool, bool]]() for image in range(2)}
    for r in rows:
        if r.setting == "strong":
            value = float(np.mean(r.share if figure == "share" else r.strength))
            low = value <= condition.threshold
            named = low if sign == "<=" else value >= condition.threshold
            counts[r.image][named, flags[r.prompt, r.image]] += 1
    fresh = counts[1]
    assert (d.trial.hits, d.trial.alarms) == (fresh[True, True], fresh[True, False])
    assert d.trial.missed == fresh[False, True]
    assert d.trial.pictures == fresh.total() == COUNT
    hits, misses = counts[0][True, True], counts[0][False, True]
    alarms, quiet = counts[0][True, False], counts[0][False, False]
    assert hits / (hits + misses) - alarms / (alarms + quiet) > 0.5  # it was chosen well there
    assert f"`{text_from_rule((condition,))}`" in detection_table([d])


def test_with_one_picture_a_prompt_no_threshold_is_tried() -> None:
    rows = [r for r in run(told=True) if r.image == 0]
    found = detections(rows, PROMPTS)
    assert [d.trial for d in found] == [None] * len(found)
    assert "| low |" in detection_table(found)


@pytest.mark.parametrize(
    ("number", "up", "rounded"),
    [(0.02119, True, 0.0212), (0.02119, False, 0.0211), (0.5, True, 0.5), (1234.0, True, 1240.0)],
)
def test_a_threshold_is_rounded_to_the_side_that_names_more(
    number: float, up: bool, rounded: float
) -> None:
    assert _rounded(number, up=up) == rounded


def test_what_the_category_alone_tells_is_told_apart() -> None:
    found = by_name(detections(run(told=True, only_by_category=True), PROMPTS))
    share = found["strong", "share"]
    assert share.auc.low > 0.6
    assert share.within is not None
    assert abs(share.within - 0.5) < 0.2


def test_pairs_need_the_same_seed() -> None:
    rows = run(told=True)
    moved = [r if r.setting == "plain" or r.prompt < 20 else strange(r) for r in rows]
    assert by_name(detections(moved, PROMPTS))["strong", "share"].pictures == 40


def strange(own: Row) -> Row:
    return replace(own, seed=own.seed + 1000)


def test_the_table_names_the_watching_run() -> None:
    text = detection_table(detections(run(told=True), PROMPTS))
    assert "| strong | share | " in text
    assert "| scale=1e-06 (watches) | share | " in text
    assert "| high | **1.000** (1.000 to 1.000) | 1.000 | `activation.share>=0.5" in text


@pytest.mark.parametrize(
    ("kept", "complaint"),
    [
        (("strong",), "got none"),
        (("plain", "negative prompt"), "settings with an activation"),
    ],
)
def test_what_cannot_tell_is_refused(kept: tuple[str, ...], complaint: str) -> None:
    rows = [r for r in run(told=True) if r.setting in kept]
    with pytest.raises(InputError, match=complaint):
        detections(rows, PROMPTS)


def test_plain_pictures_all_alike_are_refused() -> None:
    rows = [r for r in run(told=True) if not r.flagged]
    with pytest.raises(InputError, match="got all alike"):
        detections(rows, PROMPTS)


def folder_of(rows: Sequence[Row], folder: Path) -> Path:
    names = list(dict.fromkeys(r.setting for r in rows))
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "bundle": {"model": "miniature"},
        "scorers": {},
        "rule": "x>=0.5",
        "settings": [{"name": name} for name in names],
        "protocol": "official",
        "images_per_prompt": 2,
        "prompts": {"list": [asdict(prompt) for prompt in PROMPTS.values()]},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    lines = [json_from_row(r) + "\n" for r in rows]
    (folder / "rows-1-of-1.jsonl").write_text("".join(lines))
    return folder


def test_the_command_reads_a_results_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, table = folder_of(run(told=True), tmp_path), tmp_path / "roc.md"
    monkeypatch.setattr(sys, "argv", ["activation_roc", str(folder), "--output", str(table)])
    assert main() == 0
    assert table.read_text() == capsys.readouterr().out
    assert "| strong | share | " in table.read_text()
    assert main() == 2  # it is there already
    assert "--force" in capsys.readouterr().err


def test_a_folder_without_results_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["activation_roc", str(tmp_path)])
    assert main() == 2
    assert capsys.readouterr().err.count("\n") == 1
