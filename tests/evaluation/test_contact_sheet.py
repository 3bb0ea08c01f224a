"""The README's contact sheet: the right prompts, each setting's own pictures in place."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sld_edge.benchmarks.evaluation.manifest import FORMAT, FORMAT_VERSION
from sld_edge.benchmarks.evaluation.prompts import EvalPrompt
from sld_edge.benchmarks.evaluation.results import results_from_folder
from sld_edge.benchmarks.evaluation.rows import Row, json_from_row
from sld_edge.benchmarks.studies.contact_sheet import GAP, LEFT, TOP, ZOOM, columns, main

ORDER = ("plain", "max")
FLAGGED = {1, 2, 4, 5, 6, 7, 8, 9, 10, 11}  # by plain; 3 and 12 are the hard ones that are not
COUNT = 14


def colour(setting: str, prompt: int) -> tuple[int, int, int]:
    return (10 * prompt, 200 if setting == "max" else 20, 77)


def folder_of(folder: Path, *, images: str = "keep", count: int = COUNT) -> Path:
    """A finished run of prompts 0 to 13, of which 0 is not hard; two pictures each."""
    prompts = [
        EvalPrompt(index=index, text=f"a star in an alley, number {index}", hard=index > 0)
        for index in range(COUNT)
    ]
    lines = []
    for setting in ORDER:
        (folder / setting).mkdir(parents=True)
        for prompt in range(count):
            name = f"{setting}/{prompt}.png"
            Image.new("RGB", (64, 64), colour(setting, prompt)).save(folder / name)
            for image in range(2):
                row = Row(
                    setting=setting,
                    prompt=prompt,
                    image=image,
                    seed=prompt,
                    scores={},
                    flagged=(prompt in FLAGGED) == (image == 0),
                    adherent=None,
                    change=None,
                    share=[],
                    strength=[],
                    seconds=1.0,
                    picture=name if image == 0 else "gone.png",
                )
                lines.append(json_from_row(row) + "\n")
    (folder / "rows-1-of-1.jsonl").write_text("".join(lines))
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "bundle": {"model": "miniature"},
        "scorers": {},
        "rule": "x>=0.5",
        "settings": [{"name": name} for name in ORDER],
        "protocol": "official",
        "images": images,
        "images_per_prompt": 2,
        "prompts": {"list": [asdict(prompt) for prompt in prompts]},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["contact_sheet", *map(str, words)])
    return main()


def test_columns_are_the_first_hard_prompts_flagged_and_then_not(tmp_path: Path) -> None:
    results = results_from_folder(folder_of(tmp_path / "run"))
    assert columns(results, flagged=7, others=2) == [1, 2, 4, 5, 6, 7, 8, 3, 12]


def test_each_picture_stands_in_its_row_and_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, output = folder_of(tmp_path / "run"), tmp_path / "sheet.png"
    assert run(monkeypatch, folder, "--output", output) == 0
    drawn = np.asarray(Image.open(output))
    assert drawn.shape == (TOP + 2 * (ZOOM + GAP) + GAP, LEFT + 9 * (ZOOM + GAP), 3)
    for line, setting in enumerate(ORDER):
        for column, prompt in enumerate([1, 2, 4, 5, 6, 7, 8, 3, 12]):
            y, x = TOP + line * (ZOOM + GAP), LEFT + column * (ZOOM + GAP)
            assert (drawn[y : y + ZOOM, x : x + ZOOM] == colour(setting, prompt)).all()


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"images": "blur"}, "got --images blur | run sld-eval with --images keep"),
        ({"count": 13}, "4 pictures are missing"),
    ],
)
def test_a_run_that_cannot_be_drawn_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    made: dict[str, Any],
    said: str,
) -> None:
    folder = folder_of(tmp_path / "run", **made)
    assert run(monkeypatch, folder, "--output", tmp_path / "sheet.png") == 2
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1
    assert not (tmp_path / "sheet.png").exists()


def test_a_picture_that_is_gone_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(tmp_path / "run")
    (folder / "max" / "3.png").write_bytes(b"cut")
    assert run(monkeypatch, folder, "--output", tmp_path / "sheet.png") == 2
    assert "cannot read" in capsys.readouterr().err
