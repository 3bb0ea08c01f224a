"""Activation as a detector: planted signals are found, absent ones are not."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from sld_edge.benchmarks.activation_roc import (
    CANDIDATES,
    Detection,
    detection_table,
    detections,
    main,
)
from sld_edge.benchmarks.evaluation.manifest import FORMAT, FORMAT_VERSION
from sld_edge.benchmarks.evaluation.prompts import EvalPrompt
from sld_edge.benchmarks.evaluation.rows import Row, json_from_row
from sld_edge.engines.errors import InputError

COUNT = 60
PROMPTS = {
    index: EvalPrompt(
        index=index, text=f"picture {index}", categories=("dark" if index % 2 else "bright",)
    )
    for index in range(COUNT)
}


def row(setting: str, prompt: int, *, flagged: bool, share: Sequence[float], change: float) -> Row:
    return Row(
        setting=setting,
        prompt=prompt,
        image=0,
        seed=prompt,
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
    for prompt in range(COUNT):
        dark = prompt % 2 == 1
        flagged = bool(rng.random() < (0.8 if dark else 0.2))
        signal = (dark if only_by_category else flagged) * 0.4 if told else 0.0
        shares = [0.1 + signal + 0.1 * rng.random() for _ in range(3)]
        rows += [
            row("plain", prompt, flagged=flagged, share=[0, 0, 0], change=0.0),
            row("strong", prompt, flagged=False, share=shares, change=0.2),
            row("scale=1e-06", prompt, flagged=flagged, share=shares, change=1e-5),
            row("negative prompt", prompt, flagged=False, share=[0, 0, 0], change=0.2),
        ]
    return rows


def by_name(found: Sequence[Detection]) -> dict[tuple[str, str], Detection]:
    return {(d.setting, d.candidate): d for d in found}


def test_a_planted_signal_is_found() -> None:
    found = by_name(detections(run(told=True), PROMPTS))
    assert set(found) == {(s, c) for s in ("strong", "scale=1e-06") for c in CANDIDATES}
    share = found["strong", "mean share"]
    assert (share.auc.value, share.within, share.pictures) == (1.0, 1.0, COUNT)
    assert share.flagged == sum(r.flagged for r in run(told=True) if r.setting == "plain")
    assert found["strong", "mean strength"].auc.value == 0.0  # it falls where the share rises
    assert found["scale=1e-06", "mean share"].watches
    assert not share.watches


def test_no_signal_is_not_found() -> None:
    for d in detections(run(told=False), PROMPTS):
        assert d.auc.low < 0.5 < d.auc.high


def test_what_the_category_alone_tells_is_told_apart() -> None:
    found = by_name(detections(run(told=True, only_by_category=True), PROMPTS))
    share = found["strong", "mean share"]
    assert share.auc.low > 0.6
    assert share.within is not None
    assert abs(share.within - 0.5) < 0.2


def test_pairs_need_the_same_seed() -> None:
    rows = run(told=True)
    moved = [r if r.setting == "plain" or r.prompt < 20 else strange(r) for r in rows]
    assert by_name(detections(moved, PROMPTS))["strong", "mean share"].pictures == 20


def strange(own: Row) -> Row:
    values = {name: getattr(own, name) for name in Row.__dataclass_fields__}
    return Row(**{**values, "seed": own.seed + 1000})


def test_the_table_names_the_watching_run() -> None:
    text = detection_table(detections(run(told=True), PROMPTS))
    assert "| strong | mean share |" in text
    assert "| scale=1e-06 (watches) | mean share |" in text
    assert "**1.000** (1.000 to 1.000) | 1.000 |" in text


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
        "images_per_prompt": 1,
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
    assert "| strong | mean share |" in table.read_text()
    assert main() == 2  # it is there already
    assert "--force" in capsys.readouterr().err


def test_a_folder_without_results_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["activation_roc", str(tmp_path)])
    assert main() == 2
    assert capsys.readouterr().err.count("\n") == 1
