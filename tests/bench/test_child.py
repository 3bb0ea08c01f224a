"""Measured processes that answer, and those that do not."""

from __future__ import annotations

import sys
import time

import pytest

from sld_edge.benchmarks.bench.child import MARK, run_child
from sld_edge.engines.errors import EngineError

ANSWERS = f"""
import json, sys, time
task = json.loads(sys.argv[1])
print("a library says something")
held = bytearray(task["bytes"])
time.sleep(0.05)
del held
print({MARK!r} + json.dumps({{"twice": 2 * task["bytes"], "at": time.monotonic()}}), flush=True)
sys.stdin.read()
"""


def test_an_answer_and_what_was_read_from_outside() -> None:
    begin = time.monotonic()
    held = 48 * 2**20
    found = run_child([sys.executable, "-c", ANSWERS], {"bytes": held}, name="child")
    assert found.answer["twice"] == 2 * held
    assert begin <= found.started < found.answer["at"] < time.monotonic()
    if sys.platform.startswith("linux"):
        assert found.readings[-1].peak > held  # read after it was given back
        assert found.readings[-1].resident < held
        assert max(reading.anonymous for reading in found.readings) > held


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL, perhaps .* memory"),
        ("import os; os.abort()", "ended by SIGABRT"),
        ("raise ValueError('no such thing')", r"exit code 1 \| ValueError: no such thing"),
        ("import sys; sys.exit('error: it is full')", r"exit code 1 \| it is full"),
        ("pass", "exit code 0 .* it said nothing"),
    ],
)
def test_a_crash_is_one_clear_line(code: str, message: str) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        run_child([sys.executable, "-c", code], {}, name="max, 4 at once")
    assert str(caught.value).startswith("max, 4 at once: its process ")
    assert "\n" not in str(caught.value)
