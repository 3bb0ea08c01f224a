"""Damaged files of every kind: one line, or the honest picture. Never a traceback, hang or abort.

pytest -m fuzz --budget SECONDS     10,000 mutations, or as many as the time allows
"""

from __future__ import annotations

import sys
import time

import pytest

from oracles.fuzzer import run

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and links of Linux")


def test_200_mutations() -> None:
    wrong = run(200, float("inf"), first=1)
    assert not wrong, "\n".join(wrong)


@pytest.mark.fuzz
def test_ten_thousand_mutations(budget: float) -> None:
    wrong = run(10_000, time.monotonic() + budget, first=3_000_000)
    assert not wrong, "\n".join(wrong)
