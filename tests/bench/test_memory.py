"""Memory by phase: what Linux says, as recorded, and of a real process."""

from __future__ import annotations

import mmap
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from sld_edge.benchmarks.bench.memory import Phase, PhaseMeter, sampled
from sld_edge.engines.cuda.device import Device
from sld_edge.runtime import process_memory
from sld_edge.runtime.process_memory import Reading, read_memory, reading_from_status
from standin.cuda import FakeCuda

STATUS = """\
Name:\tpython3.11
Umask:\t0022
State:\tR (running)
VmPeak:\t 5240064 kB
VmSize:\t 5208340 kB
VmHWM:\t 4918272 kB
VmRSS:\t 3802112 kB
RssAnon:\t  457728 kB
RssFile:\t 3344320 kB
RssShmem:\t      64 kB
VmData:\t  910560 kB
Threads:\t3
"""
ZOMBIE = "Name:\tpython3.11\nState:\tZ (zombie)\nThreads:\t1\n"
MIB = 2**20
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def test_a_recorded_status() -> None:
    assert reading_from_status(STATUS, at=3.5) == Reading(
        at=3.5,
        resident=3802112 * 1024,
        anonymous=457728 * 1024,
        mapped=(3344320 + 64) * 1024,
        peak=4918272 * 1024,
    )


def test_an_ended_process_and_a_system_without_proc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reading_from_status(ZOMBIE, at=0) is None
    monkeypatch.setattr(process_memory, "_PROC", tmp_path)
    assert read_memory() is None
    meter = PhaseMeter()
    meter.end("start")
    (phase,) = meter.phases
    assert (phase.name, phase.peak, phase.anonymous, phase.mapped) == ("start", None, None, None)
    assert sampled(phase, []) == phase


def test_a_phase_takes_the_most_of_its_own_samples() -> None:
    def reading(at: float, anonymous: int, mapped: int) -> Reading:
        return Reading(
            at=at, resident=anonymous + mapped, anonymous=anonymous, mapped=mapped, peak=10**9
        )

    phase = Phase(name="denoise", begin=1.0, end=2.0, peak=70, anonymous=12, mapped=20)
    readings = [reading(0.9, 90, 90), reading(1.2, 40, 5), reading(2.0, 3, 30), reading(2.1, 99, 9)]
    found = sampled(phase, readings)
    assert (found.peak, found.anonymous, found.mapped) == (70, 40, 30)


@linux
def test_phases_of_this_process_have_peaks_of_their_own() -> None:
    meter = PhaseMeter()
    meter.end("before")
    with mmap.mmap(-1, 64 * MIB) as held:  # never memory that was freed before and kept
        np.frombuffer(held, np.uint8)[:] = 1
    meter.end("large")
    time.sleep(0.001)
    meter.end("after")
    before, large, after = meter.phases
    assert before.peak is not None
    assert large.peak is not None
    assert after.peak is not None
    assert large.peak - after.peak > 48 * MIB  # the peak was set back
    assert before.end <= large.begin <= large.end <= after.begin <= after.end


def test_a_phase_tells_what_is_used_on_the_device() -> None:
    device = Device(cuda=FakeCuda(total_memory=MIB))
    address = device.allocate(1000)
    meter = PhaseMeter()
    meter.end("denoise", device=device)
    device.free(address)
    meter.end("decode", device=device)
    device.close()
    assert [phase.device for phase in meter.phases] == [1000, 0]
