"""Every environment variable that sld-edge reads, parsed in one place.

SLD_EDGE_CACHE: where prepared session files are kept; "0" or "off" keeps none.
SLD_EDGE_CACHE_LIMIT: GB that may be kept there, 20 where unset; "0" is no limit.
SLD_EDGE_THREADS: threads of the CPU engines; unset or "0" means one a core.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from sld_edge.engines.errors import InputError

_CACHE_GB = 20.0


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return the cache's folder, not made yet, or None where caching is switched off."""
    named = environment.get("SLD_EDGE_CACHE", "")
    if named.lower() in ("0", "off"):
        return None
    if named:
        return Path(named)
    if sys.platform == "win32" and "LOCALAPPDATA" in environment:
        return Path(environment["LOCALAPPDATA"]) / "sld-edge"
    base = environment.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "sld-edge"
    except RuntimeError:  # no home directory, as in some services
        return None


def cache_limit(environment: Mapping[str, str] = os.environ) -> int:
    """Return the bytes that the cache may hold; 0 is no limit."""
    named = environment.get("SLD_EDGE_CACHE_LIMIT", "")
    try:
        size = float(named) if named else _CACHE_GB
    except ValueError:
        size = -1.0
    if not 0 <= size < 1e9:
        raise InputError("SLD_EDGE_CACHE_LIMIT", got=repr(named), expected="a number of GB")
    return int(size * 1e9)


def thread_count(environment: Mapping[str, str] = os.environ) -> int:
    """Return the threads asked for; 0 leaves the choice to the engine."""
    named = environment.get("SLD_EDGE_THREADS", "0")
    if not named.isdecimal():
        raise InputError("SLD_EDGE_THREADS", got=repr(named), expected="a whole number")
    return int(named)
