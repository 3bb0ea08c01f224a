"""Rows: whole or not there, none twice, and read back as they were."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from sld_edge.benchmarks.evaluation.rows import (
    Row,
    append_rows,
    drop_torn_line,
    json_from_row,
    read_rows,
)
from sld_edge.engines.errors import InputError, OutputError


def row(**changed: object) -> Row:
    values: dict[str, object] = {
        "setting": "plain",
        "prompt": 0,
        "image": 0,
        "seed": 2**32 - 1,
        "scores": {"a.b": 0.1 + 0.2},
        "flagged": False,
        "adherent": None,
        "change": 0.0,
        "share": [0.0, 0.25],
        "strength": [0.0, 1e-7],
        "seconds": 0.5,
        "picture": None,
    }
    return Row(**{**values, **changed})  # type: ignore[arg-type]  # of the fields' own types


def test_rows_read_back_bit_by_bit_and_sorted(tmp_path: Path) -> None:
    rows = [
        row(prompt=1),
        row(
            setting="max",
            adherent=True,
            edit_map="m.png",
            edit_map_max=0.1,
            concepts=["a", "b"],
            concept_strength=[0.1, 0.2],
            strongest_concept="b",
        ),
        row(image=1, picture="é.png"),
    ]
    append_rows(tmp_path / "rows-1-of-2.jsonl", rows[:2])
    append_rows(tmp_path / "rows-2-of-2.jsonl", rows[2:])
    assert read_rows(tmp_path) == [rows[1], rows[2], rows[0]]


def test_a_torn_last_line_is_left_out_and_then_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows-1-of-1.jsonl"
    whole = json_from_row(row()).encode() + b"\n"
    for cut in (1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole + json_from_row(row(image=1)).encode()[:cut])
        assert read_rows(tmp_path) == [row()]
        drop_torn_line(path)
        append_rows(path, [row(image=2)])
        assert read_rows(tmp_path) == [row(), row(image=2)]


def test_a_full_disk_leaves_whole_rows_and_says_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows-1-of-1.jsonl"
    append_rows(path, [row()])

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match="No space left .* goes on where it was"):
            append_rows(path, [row(image=1), row(image=2)])
    assert read_rows(tmp_path) == [row()]
    append_rows(path, [row(image=3)])
    assert [found.image for found in read_rows(tmp_path)] == [0, 3]


@pytest.mark.parametrize(
    "changed",
    [
        {"prompt": -1},
        {"scores": {"a.b": float("nan")}},
        {"scores": {"a.b": None}},
        {"flagged": 1},
        {"share": "0"},
        {"seed": 1.5},
        {"extra": 1},
        {"edit_map_max": "much"},
        {"concepts": "violence"},
        {"concepts": ["violence"], "concept_strength": []},
    ],
)
def test_what_is_no_row_is_named_by_file_and_line(
    tmp_path: Path, changed: dict[str, object]
) -> None:
    path = tmp_path / "rows-1-of-1.jsonl"
    values = {**json.loads(json_from_row(row())), **changed}
    path.write_text(json_from_row(row(prompt=5)) + "\n" + json.dumps(values) + "\n")
    with pytest.raises(InputError, match=r"rows-1-of-1.jsonl, line 2, is not a row"):
        read_rows(tmp_path)


def test_a_row_of_an_older_version_says_nothing_of_maps_and_concepts(tmp_path: Path) -> None:
    newer = ("edit_map", "edit_map_max", "concepts", "concept_strength", "strongest_concept")
    values = {k: v for k, v in json.loads(json_from_row(row())).items() if k not in newer}
    (tmp_path / "rows-1-of-1.jsonl").write_text(json.dumps(values) + "\n")
    (found,) = read_rows(tmp_path)
    assert found == row()
    assert (found.edit_map, found.edit_map_max, found.concepts) == (None, None, [])


def test_one_picture_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows-1-of-2.jsonl").write_text(json_from_row(row()) + "\n")
    (tmp_path / "rows-2-of-2.jsonl").write_text(json_from_row(row(seed=3)) + "\n")
    with pytest.raises(InputError, match="line 1 .* second row of \\('plain', 0, 0\\)"):
        read_rows(tmp_path)
