"""One measured process: it is started, watched from outside, and ends after its answer.

A child gets its task as JSON, its last argument. It prints one line, `MARK` and a JSON object, then
waits until its input ends: its memory is read once more while the process is still there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from sld_edge.benchmarks.bench.memory import Sampler
from sld_edge.engines.errors import EngineError, one_line
from sld_edge.runtime.process_memory import Reading

MARK = "sld-bench: "


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A child's answer, and its memory while it ran.

    Attributes:
        started: `time.monotonic` just before the process.
        answer: the JSON object that the process printed.
        readings: the memory of the process, every 10 ms.
    """

    started: float
    answer: Mapping[str, Any]
    readings: Sequence[Reading]


def run_child(
    command: Sequence[str],
    task: Mapping[str, Any],
    *,
    name: str,
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """Run a command with a task and return its answer.

    Args:
        command: without the task.
        task: becomes the last argument, as JSON.
        name: the process's name in errors.
        environment: variables beside this process's own.

    Raises:
        EngineError: the process ended without an answer; the error has its last line.
    """
    with tempfile.TemporaryFile() as errors:
        started = time.monotonic()
        process = subprocess.Popen(
            [*command, json.dumps(task)],
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
        )
        try:
            sampler = Sampler(process.pid)
            answer = _answer(process)
            sampler.stop()
            process.communicate()
        finally:
            if process.poll() is None:  # interrupted
                process.kill()
                process.wait()
        if answer is None:
            raise EngineError(f"{name}: its process {_end(process.returncode, errors)}")
    return Outcome(started=started, answer=answer, readings=sampler.readings)


def _answer(process: subprocess.Popen[bytes]) -> dict[str, Any] | None:
    assert process.stdout is not None
    for raw in process.stdout:
        line = raw.decode("utf-8", "replace")
        if line.startswith(MARK):
            answer: dict[str, Any] = json.loads(line[len(MARK) :])
            return answer
    return None


def _end(code: int, errors: IO[bytes]) -> str:
    """Say how a process ended, with the last line it wrote."""
    errors.seek(0)
    lines = errors.read().decode("utf-8", "replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
    how = f"ended with exit code {code}"
    if code < 0:
        memory = ", perhaps it was out of memory" if -code == signal.SIGKILL else ""
        how = f"was ended by {signal.Signals(-code).name}{memory}"
    return f"{how} | {one_line(last.removeprefix('error: '))}"
