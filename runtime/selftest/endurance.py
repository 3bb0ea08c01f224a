"""Many pictures in a row: the latency of each stage, the peak of memory, and whether it stays flat.

Two memories are watched: the device's, used by all processes together, and this process's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sld_edge.runtime.process_memory import read_memory
from sld_edge.runtime.result import Result
from sld_edge.runtime.selftest.budget import Budget
from sld_edge.runtime.selftest.checks import Checks
from sld_edge.runtime.selftest.subject import Subject

FLAT = "pictures with flat memory"
PICTURES = 100
LEAST = 5  # pictures for percentiles
_WARM = 3  # first pictures, which still allocate and compile
_GROWTH = 16 << 20  # bytes; other programs and Python's allocator change as much
_WINDOW = 10  # readings; the least of them is not changed by a short use of another program

# Takes a subject, a seed, and a function that it calls at every UNet call; makes a picture.
Ask = Callable[[Subject, int, Callable[[], object]], Result]


@dataclass(kw_only=True)
class MemoryWatch:
    """Reads both memories, in bytes; a reading is None where the system does not say."""

    subject: Subject
    device_peak: int | None = None

    def device(self) -> int | None:
        """Return the device's used memory, and remember the peak."""
        device = self.subject.device
        if device is None:
            return None
        free, total = device.memory()
        self.device_peak = max(total - free, self.device_peak or 0)
        return total - free

    def process(self) -> int | None:
        """Return this process's resident memory."""
        reading = read_memory()
        return None if reading is None else reading.resident


@dataclass(kw_only=True)
class Endurance:
    """What the pictures showed.

    Attributes:
        seconds: of every warm picture, by stage: "text", "UNet call", "decode", "picture".
        device: used memory of the device after each picture.
        process: resident memory of this process after each picture.
        made: pictures.
    """

    seconds: dict[str, list[float]] = field(default_factory=dict)
    device: list[int] = field(default_factory=list)
    process: list[int] = field(default_factory=list)
    made: int = 0

    def add(self, result: Result, watch: MemoryWatch) -> None:
        """Take in a picture."""
        self.made += 1
        if self.made > _WARM:
            for stage, samples in stages(result).items():
                self.seconds.setdefault(stage, []).extend(samples)
        for readings, now in ((self.device, watch.device()), (self.process, watch.process())):
            if now is not None:
                readings.append(now)

    def latency(self) -> dict[str, dict[str, float]]:
        """Return median and 95th percentile of the warm pictures by stage, in seconds."""
        return {stage: percentiles(samples) for stage, samples in self.seconds.items() if samples}


def endure(
    subject: Subject, watch: MemoryWatch, ask: Ask, checks: Checks, budget: Budget, share: float
) -> Endurance:
    """Make `PICTURES` pictures, or as many as a share of the budget takes, and check the memory."""
    seen = Endurance()
    name = f"{PICTURES} {FLAT}"
    with checks.watched(name):
        while seen.made < PICTURES and budget.covers(share=share):
            seen.add(ask(subject, seen.made, watch.device), watch)
        growths = {
            kind: growth(readings)
            for kind, readings in (("device", seen.device), ("process", seen.process))
            if len(readings) >= _WARM + 2 * _WINDOW
        }
        text = f"{seen.made} pictures" + "".join(
            f"; {kind} memory {bytes_ / 2**20:+.1f} MiB (to {_GROWTH / 2**20:g})"
            for kind, bytes_ in growths.items()
        )
        grown = any(bytes_ > _GROWTH for bytes_ in growths.values())
        numbers: dict[str, Any] = {"pictures": seen.made, "growth_bytes": growths}
        if grown:
            checks.tell(name, text, False, **numbers)
        elif seen.made < PICTURES:
            checks.tell(name, f"only {text}: the time was over", "skipped", **numbers)
        elif not growths:
            checks.tell(name, "this system does not report memory", "not applicable", **numbers)
        else:
            checks.tell(name, text, True, **numbers)
    return seen


def growth(readings: Sequence[int]) -> int:
    """Return by how much the least of the last readings is above the least of the first, warm."""
    warm = readings[_WARM:]
    return min(warm[-_WINDOW:]) - min(warm[:_WINDOW])


def stages(result: Result) -> dict[str, list[float]]:
    """Return the seconds of a result with one picture, by stage."""
    report = result.reports[0]
    seconds = report["seconds"]
    return {
        "text": [seconds["text"]],
        "UNet call": [call["seconds"] for call in report["calls"]],
        "decode": [seconds["decode"]],
        "picture": [seconds["text"] + seconds["denoise"] + seconds["decode"]],
    }


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """Return count, median and 95th percentile, interpolated linearly."""
    p50, p95 = (round(float(value), 6) for value in np.percentile(samples, [50, 95]))
    return {"count": len(samples), "p50": p50, "p95": p95}
