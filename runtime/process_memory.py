"""Memory of a process now, from Linux's /proc.

The kernel counts the exact peak, which can be reset to the present memory.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Memory of a process at `at`, seconds of `time.monotonic`; all else is in bytes.

    Attributes:
        at: time of the reading.
        resident: held now.
        anonymous: the part of `resident` without a file behind it.
        mapped: the rest, pages of files and shared memory.
        peak: highest `resident` since the start or the last reset.
    """

    at: float
    resident: int
    anonymous: int
    mapped: int
    peak: int


def reading_from_status(text: str, *, at: float) -> Reading | None:
    """Return the memory in /proc/PID/status; None if the process has ended or it is not there."""
    sizes = {}
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        if name in ("VmRSS", "VmHWM", "RssAnon", "RssFile", "RssShmem"):
            sizes[name] = int(rest.split()[0]) * 1024
    if len(sizes) < 5:
        return None
    return Reading(
        at=at,
        resident=sizes["VmRSS"],
        anonymous=sizes["RssAnon"],
        mapped=sizes["RssFile"] + sizes["RssShmem"],
        peak=sizes["VmHWM"],
    )


def read_memory(process: int | str = "self") -> Reading | None:
    """Return a process's memory now; None where the system does not say."""
    try:
        text = (_PROC / str(process) / "status").read_text(encoding="utf-8")
    except OSError:
        return None
    return reading_from_status(text, at=time.monotonic())


def reset_peak() -> None:
    """Make the present memory of this process its peak, where the system can."""
    with contextlib.suppress(OSError):
        (_PROC / "self" / "clear_refs").write_text("5", encoding="ascii")
