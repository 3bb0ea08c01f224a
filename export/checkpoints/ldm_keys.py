"""Looking up and renaming the keys of a file in the original layout."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from sld_edge.engines.errors import CheckpointError
from sld_edge.export.checkpoints.weights import Entry

# Channels of a head in all text encoders and in the UNets of 2.x and XL; those of 1.x have 8 heads.
HEAD_WIDTH = 64


def under(entries: Mapping[str, Entry], prefix: str) -> dict[str, Entry]:
    """Return the entries whose keys start with `prefix`, with the prefix removed."""
    return {k.removeprefix(prefix): e for k, e in entries.items() if k.startswith(prefix)}


def count_of(keys: Iterable[str], pattern: str) -> int:
    """Return how many different numbers the pattern's group matches."""
    return len({m[1] for key in keys if (m := re.match(pattern, key))})


def renamed(key: str, names: Mapping[str, str]) -> str:
    """Replace whole dotted parts of a key."""
    for old, new in names.items():
        key = re.sub(rf"(^|\.){re.escape(old)}(\.|$)", rf"\g<1>{new}\g<2>", key)
    return key


def start_renamed(key: str, names: Mapping[str, str]) -> str:
    """Replace the longest listed start of a key."""
    parts = key.split(".")
    for n in range(len(parts) - 1, 0, -1):
        start = ".".join(parts[:n])
        if start in names:
            return ".".join([names[start], *parts[n:]])
    return key


def rows_of(entries: Mapping[str, Entry], key: str) -> int:
    """Return the first size of a tensor's shape; a CheckpointError where it is missing."""
    return size_of(entries, key, 0)


def size_of(entries: Mapping[str, Entry], key: str, axis: int) -> int:
    """Return one size of a tensor's shape; a CheckpointError where it is missing."""
    if key not in entries:
        raise CheckpointError(f"the file lacks tensor {key}")
    shape = entries[key].shape
    if axis >= len(shape) or not shape[axis]:
        raise CheckpointError(f"the file's tensor {key} has shape", got=list(shape))
    return shape[axis]
