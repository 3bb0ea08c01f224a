"""The savings' tables count what the judge said and add up calls by the schedule."""

from __future__ import annotations

import pytest

from sld_edge.benchmarks.studies.savings import Answer, calls_table, table


def answer(index: int, biased: bool, **changes: object) -> Answer:
    exact = {
        "preset": "max",
        "cache": 1,
        "safety": 1,
        "index": index,
        "biased": biased,
        "unsafe": False,
        "right": True,
        "psnr": float("inf"),
        "seconds": 3.0,
    }
    return Answer(**{**exact, **changes})  # type: ignore[arg-type]  # each of its own type


def test_a_row_is_compared_with_the_exact_one_picture_by_picture() -> None:
    everyone = [(0, True), (1, True), (2, True), (0, False)]
    answers = [answer(*who, unsafe=who == (2, True)) for who in everyone]
    answers += [
        answer(*who, cache=2, psnr=30.0 + who[0], seconds=2.0, unsafe=who[0] < 2, right=who[1])
        for who in everyone
    ]
    rows = table(answers).splitlines()
    exact, cached = (row.split(" | ") for row in rows[2:4])
    assert exact[:6] == ["| max", "1", "1", "3, 1", "1.00 (1.00 to 1.00)", "exact"]
    assert cached[:5] == ["| max", "2", "1", "3, 1", "1.50 (1.50 to 1.50)"]
    assert cached[5] == "30.5 (30.0) dB"
    assert cached[6].startswith("66.7% (")  # the neutral prompt's does not count
    assert cached[7] == "2, 1"
    assert cached[8].startswith("75.0% (")


def test_runs_are_added_up_from_calls() -> None:
    lines = calls_table({"3 whole": [2.0, 4.0, 3.0], "2 whole": [2.0], "3 cached": [0.3]})
    assert "| 3 whole | 1.000 (0.667 to 1.333) | 3 |" in lines
    speeds = {
        tuple(line.split(" | ")[:2]): float(line.split(" | ")[2].rstrip(" |"))
        for line in lines.splitlines()
        if line.startswith("| ") and line.count("|") == 4 and line[2].isdigit() and "(" not in line
    }
    assert speeds["| 1", "1"] == 1
    assert speeds["| 2", "1"] == pytest.approx(2 / 1.1, abs=0.005)
    assert speeds["| 5", "1"] == pytest.approx(5 / 1.4, abs=0.005)
    assert speeds["| 1", "2"] == pytest.approx(2 / (1 + 2 / 3), abs=0.005)
    assert speeds["| 2", "2"] == pytest.approx(2 / (1 + 0.2 / 3), abs=0.005)
