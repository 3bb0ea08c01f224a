"""Every environment variable that sld-edge reads, parsed in one place.

SLD_EDGE_CACHE: the folder of the cache; "0" or "off" switches the cache off.
SLD_EDGE_CACHE_LIMIT: the cache's limit in GB, 20 where unset; "0" is no limit.
SLD_EDGE_THREADS: threads of the CPU engines; unset or "0" means one per core.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from sld_edge.engines.errors import InputError

_CACHE_GB = 20.0


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return the cache's folder, which may not exist yet, or None where the cache is off."""
    value = environment.get("SLD_EDGE_CACHE", "")
    if value.lower() in ("0", "off"):
        return None
    if value:
        return Path(value)
    if sys.platform == "win32" and "LOCALAPPDATA" in environment:
        return Path(environment["LOCALAPPDATA"]) / "sld-edge"
    base = environment.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "sld-edge"
    except RuntimeError:  # no home directory, as in some services
        return None


def cache_limit(environment: Mapping[str, str] = os.environ) -> int:
    """Return the bytes that the cache may hold; 0 is no limit."""
    value = environment.get("SLD_EDGE_CACHE_LIMIT", "")
    try:
        size = float(value) if value else _CACHE_GB
    except ValueError:
        size = -1.0
    if not 0 <= size < 1e9:
        raise InputError("SLD_EDGE_CACHE_LIMIT", got=repr(value), expected="a number of GB")
    return int(size * 1e9)


def thread_count(environment: Mapping[str, str] = os.environ) -> int:
    """Return the number of threads; 0 leaves the choice to the engine."""
    value = environment.get("SLD_EDGE_THREADS", "0")
    if not value.isdecimal():
        raise InputError("SLD_EDGE_THREADS", got=repr(value), expected="a whole number")
    return int(value)
