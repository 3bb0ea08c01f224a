"""The pages of a mapped file, given back to the system."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path
from typing import Final

_MAPS: Final = Path("/proc/self/maps")
_DONTNEED: Final = 4  # MADV_DONTNEED of Linux
_LINE: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r-.. \S+ \S+ \d+ +(.+)")


def release_pages(file: Path) -> int:
    """Give back the resident pages of a file that is mapped read-only; return the bytes mapped.

    The next access reads a page again, so only time can be lost. Where the system does not list
    its mappings, nothing happens.
    """
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return 0
    name, madvise, released = os.path.realpath(file), ctypes.CDLL(None).madvise, 0
    for mapping in filter(None, map(_LINE.fullmatch, lines)):
        start, end = int(mapping[1], 16), int(mapping[2], 16)
        size = end - start
        if mapping[3] == name and not madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(size), _DONTNEED
        ):
            released += size
    return released
