"""Freed memory goes back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# A heap as activations leave it: large blocks freed, a small one above them still held. The first
# block teaches glibc, left alone, to keep blocks of its size.
_PROGRAM = """
import ctypes
from sld_edge.engines.malloc import return_large_blocks

def anonymous():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))

if {told}:
    return_large_blocks()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
size = 24 * 2**20
libc.free(libc.malloc(size))
before, blocks = anonymous(), []
for _ in range(8):
    blocks.append(libc.malloc(size))
    ctypes.memset(blocks[-1], 1, size)
held = libc.malloc(2**16)
for block in blocks:
    libc.free(block)
print(anonymous() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc")
def test_large_blocks_go_back_at_once() -> None:
    left = {}
    for told in (False, True):
        command = [sys.executable, "-c", _PROGRAM.format(told=told)]
        left[told] = int(subprocess.run(command, check=True, capture_output=True).stdout)
    assert left[True] < 2**10  # KiB
    assert left[False] > 100 * 2**10
