"""Memory of a process by phase: read from outside as it runs, or at a phase's end.

The kernel has no peak of anonymous and of mapped memory (files, the weights mostly), so these two
are sampled.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sld_edge.engines.cuda.device import Device
from sld_edge.runtime.process_memory import Reading, read_memory, reset_peak

_EVERY = 0.01  # seconds between samples


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a process's life and its memory in bytes; None if unknown.

    Attributes:
        name: start, text, denoise, decode; or run, all after the start.
        begin: `time.monotonic`.
        end: `time.monotonic`.
        peak: most resident memory, exact.
        anonymous: most anonymous memory in a sample.
        mapped: most mapped memory in a sample.
        device: used on the CUDA device at the end, by all processes.
    """

    name: str
    begin: float
    end: float
    peak: int | None = None
    anonymous: int | None = None
    mapped: int | None = None
    device: int | None = None


class PhaseMeter:
    """Marks the phases of this process; the first begins with it."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []
        self._begin = time.monotonic()

    def end(self, name: str, *, device: Device | None = None) -> None:
        """End the present phase, which gets its name now, and begin the next."""
        memory = read_memory()
        used = None
        if device is not None:
            free, total = device.memory()
            used = total - free
        phase = Phase(name=name, begin=self._begin, end=time.monotonic(), device=used)
        if memory is not None:
            phase = replace(
                phase, peak=memory.peak, anonymous=memory.anonymous, mapped=memory.mapped
            )
        self.phases.append(phase)
        reset_peak()
        self._begin = time.monotonic()


class Sampler:
    """Reads another process's memory every 10 ms, in a thread of this one."""

    def __init__(self, process: int) -> None:
        self.readings: list[Reading] = []
        self._process = process
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Read once more and end."""
        self._ended.set()
        self._thread.join()
        self._read()

    def _watch(self) -> None:
        while not self._ended.wait(_EVERY):
            self._read()

    def _read(self) -> None:
        reading = read_memory(self._process)
        if reading is not None:
            self.readings.append(reading)


def sampled(phase: Phase, readings: Sequence[Reading]) -> Phase:
    """Return a phase with the readings of its time, made from outside."""
    during = [reading for reading in readings if phase.begin <= reading.at <= phase.end]

    def most(exact: int | None, read: Sequence[int]) -> int | None:
        return max((*read, *([exact] if exact is not None else [])), default=None)

    return replace(
        phase,
        peak=most(phase.peak, [reading.resident for reading in during]),
        anonymous=most(phase.anonymous, [reading.anonymous for reading in during]),
        mapped=most(phase.mapped, [reading.mapped for reading in during]),
    )
