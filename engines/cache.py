"""The cache: a private folder of this user, its entries, and its limit.

Files of the cache run with the user's rights and decide how pictures look. So the cache is used
only where it belongs to this user and no other user can write to it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sld_edge.engines.errors import BundleError, OutputError, UserError
from sld_edge.engines.files import json_from_file
from sld_edge.engines.settings import cache_folder, cache_limit
from sld_edge.engines.staging import locked, sweep

STAMP = "prepared.json"  # in an entry of `sessions`: the graph's name, and its files' hashes
SESSIONS, JIT, FACTS, SELF_TEST = "sessions", "jit", "checked", "self-test"
TIMING = "timing"
FILTERS = "text-filters"
OURS = (SESSIONS, JIT, FACTS, SELF_TEST, TIMING, FILTERS, "ort-tensorrt", "ort-tensorrt-rtx")
# Marks a folder that sld-edge made, for backups and for `clear`: bford.info/cachedir
_TAG = "CACHEDIR.TAG"
_TAG_TEXT = "Signature: 8a477f597d28d172789f06886806bc55\n# made by sld-edge\n"
_noted: set[str] = set()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An entry of the cache: path, description, size, and time of last use (seconds since 1970)."""

    path: Path
    what: str
    bytes: int
    used: float


def private_folder(name: str) -> Path | None:
    """Return a folder of the cache, made if need be, or None where the cache is not usable.

    The cache is not usable where it is switched off, cannot be made, or is not private. Where it is
    not private, a note on standard error says so, once.
    """
    root = cache_folder()
    if root is None:
        return None
    try:
        for folder in (root, root / name):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            why = why_not_private(folder)
            if why is not None:
                _note_once(f"the cache is not used: {folder} {why}")
                return None
            if folder == root and not os.listdir(root):
                (root / _TAG).write_text(_TAG_TEXT, encoding="ascii")
    except OSError:
        return None
    return root / name


def why_not_private(folder: Path) -> str | None:
    """Return why a folder is not private to this user; None where it is.

    Raises:
        OSError: no such folder.
    """
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        return "is not a folder"
    if sys.platform == "win32":
        return None  # Windows keeps a profile's folder private
    if status.st_uid != os.geteuid():
        return "belongs to another user"
    if status.st_mode & 0o022:
        return f"can be written by others (chmod go-w {folder})"
    return None


def _note_once(line: str) -> None:
    if line not in _noted:
        _noted.add(line)
        print(f"note: {line}", file=sys.stderr)


def entry_name(*facts: str) -> str:
    """Return the name of the entry that belongs to these facts, 32 hexadecimal digits."""
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]


def remembered(kind: str, key: str) -> bool:
    """Whether `remember` recorded a fact; False where the cache is not usable."""
    folder = private_folder(FACTS)
    return folder is not None and (folder / f"{kind}-{entry_name(key)}").is_file()


def remember(kind: str, key: str) -> None:
    """Record a fact that took time to find out."""
    folder = private_folder(FACTS)
    if folder is not None:
        with suppress(OSError):
            (folder / f"{kind}-{entry_name(key)}").touch()


def entries() -> list[Entry]:
    """Return the entries of the cache, the least recently used first."""
    root = cache_folder()
    if root is None:
        return []
    paths = (path for kind in OURS for path in _listed(root / kind) if not path.is_symlink())
    return sorted(map(_entry, paths), key=lambda entry: entry.used)


def make_room(needed: int) -> bool:
    """Remove the least recently used graphs and filters until `needed` more bytes fit.

    A graph that a process has loaded stays.

    Returns:
        Whether the bytes fit; where they do not, a note says so, once.
    """
    limit = cache_limit()
    everything = entries()
    total = sum(entry.bytes for entry in everything) + needed
    for entry in everything:
        if not limit or total <= limit:
            break
        kind = entry.path.parent.name
        if (kind == SESSIONS and _drop_unused(entry.path)) or (
            kind == FILTERS and _removed(entry.path)
        ):
            total -= entry.bytes
    if limit and total > limit:
        _note_once(
            f"{needed / 1e9:.2g} GB do not fit into the cache's {limit / 1e9:.2g} GB "
            "(SLD_EDGE_CACHE_LIMIT), and are prepared again at every start"
        )
    return not limit or total <= limit


def clear() -> tuple[int, int]:
    """Empty the cache; return the number of removed entries and bytes.

    Files of other programs stay, and so do graphs that a process has loaded.

    Raises:
        OutputError: sld-edge did not make the folder, so its files may be another program's.
    """
    root = cache_folder()
    if root is None or not root.exists():
        return 0, 0
    if root.is_symlink() or not (root.name == "sld-edge" or _is_tagged(root)):
        raise OutputError(
            f"{root} was not made by sld-edge, and is not emptied",
            do=f"by hand remove those of its folders {', '.join(OURS)} that are not needed",
        )
    count = freed = 0
    for entry in entries():
        if entry.path.parent.name == SESSIONS:
            _drop_unused(entry.path)
        else:
            shutil.rmtree(entry.path, ignore_errors=True)
            with suppress(OSError):
                entry.path.unlink()
        if not entry.path.exists():
            count, freed = count + 1, freed + entry.bytes
    for folder in (root / kind for kind in OURS):
        sweep(folder)
        with suppress(OSError):
            folder.rmdir()
    return count, freed


def text() -> str:
    """Return the place and the entries of the cache, as lines for a person."""
    root = cache_folder()
    if root is None:
        return "no cache: SLD_EDGE_CACHE is off, or there is no home folder"
    everything = entries()
    facts = [entry for entry in everything if entry.path.parent.name == FACTS]
    lines = [f"cache: {root}"]
    lines += [
        f"  {entry.bytes / 1e6:9.1f} MB  last used {_day(entry.used)}  {entry.what}"
        for entry in reversed(everything)
        if entry not in facts
    ]
    total, limit = sum(entry.bytes for entry in everything), cache_limit()
    most = f"at most {limit / 1e9:g} GB (SLD_EDGE_CACHE_LIMIT)" if limit else "no limit"
    lines.append(f"in all {total / 1e6:.1f} MB; {most}; {len(facts)} checks are remembered")
    return "\n".join(lines)


def _is_tagged(root: Path) -> bool:
    try:
        return (root / _TAG).read_text(encoding="ascii") == _TAG_TEXT
    except (OSError, ValueError):
        return False


def _listed(folder: Path) -> Iterator[Path]:
    if folder.is_symlink():
        return
    with suppress(OSError):
        yield from (path for path in folder.iterdir() if not path.name.startswith("."))


def _entry(path: Path) -> Entry:
    what, used = f"{path.parent.name}: {path.name}", 0.0
    with suppress(OSError):
        used = path.stat().st_mtime
    if path.parent.name == SESSIONS:
        with suppress(OSError, UserError):
            used = (path / STAMP).stat().st_mtime
            stamp = json_from_file(path / STAMP, error=BundleError)
            what = f"prepared graph: {stamp.get('what', path.name)}"
    return Entry(path=path, what=what, bytes=_bytes(path), used=used)


def _bytes(path: Path) -> int:
    total = 0
    with suppress(OSError):
        if not path.is_dir():
            return path.lstat().st_size
        for folder, _, names in os.walk(path):
            total += sum((Path(folder) / name).lstat().st_size for name in names)
    return total


def _drop_unused(entry: Path) -> bool:
    """Remove a prepared graph unless a process has locked its stamp (see `sessions`)."""
    try:
        with locked(entry / STAMP, shared=False):
            shutil.rmtree(entry, ignore_errors=True)
    except FileNotFoundError:  # no process can use it without its stamp
        shutil.rmtree(entry, ignore_errors=True)
    except OSError:
        return False
    return not entry.exists()


def _removed(path: Path) -> bool:
    """Remove a file that `entry_name` named; another file stays."""
    if not re.fullmatch("[0-9a-f]{32}", path.name):
        return False
    with suppress(OSError):
        path.unlink()
    return not path.exists()


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
