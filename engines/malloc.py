"""How the C library gives memory back. Only glibc is told anything; elsewhere nothing changes."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_TRIM, _MAP = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
_MAP_BYTES = 4 * 2**20
_TRIM_BYTES = 64 * 2**20


@cache
def return_large_blocks() -> None:
    """Have freed blocks of 4 MiB and more go back to the system at once, in the whole process.

    By itself glibc keeps ever larger ones, up to 32 MiB, in a heap that activations of many sizes
    cut to pieces: the peak of a 512 px decode is then 1.7 times as high (docs/memory.md). The
    second threshold is what glibc would have come to: small blocks stay quick.
    Source: mallopt(3).
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(_MAP, _MAP_BYTES)
    mallopt(_TRIM, _TRIM_BYTES)
