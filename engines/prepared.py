"""Graphs prepared for this machine: made once from a bundle's graph, later loaded at once.

A `Recipe` of an engine says what a prepared graph is. It is made on the machine that runs it, is
never part of a bundle, and its name in the cache holds everything that it depends on.

Every prepared file is checked by SHA-256 before it runs. Hashing gigabytes takes seconds, so a
large file is hashed again only where its identity (device, inode, size, times) has changed since
the last time. This relies on two facts: only this user can write to the cache, which
`cache.private_folder` checks, and the system sets a file's time of change at every write.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from sld_edge.engines.base import Engine
from sld_edge.engines.cache import (
    SESSIONS,
    STAMP,
    entry_name,
    make_room,
    private_folder,
    why_not_private,
)
from sld_edge.engines.errors import EngineError, UserError
from sld_edge.engines.files import Identity, identity, json_from_file, sha256_of_file, write_whole
from sld_edge.engines.staging import hold, part_folder

_SMALL = 64_000_000  # bytes; graphs up to this size are hashed at every load, in 40 ms
_LARGE = 256_000_000  # bytes; from this size on preparation takes long and is announced
AnyEngine = TypeVar("AnyEngine", bound=Engine)


@dataclass(frozen=True, kw_only=True)
class Recipe(Generic[AnyEngine]):
    """How an engine prepares and loads a graph.

    Attributes:
        facts: everything but the graph that a prepared graph depends on, ready for JSON.
        files: the names of a prepared graph's files; the first is the graph, the second holds
            weights and may be missing.
        write: prepares the graph of the first path in the folder of the second. It raises
            `EngineError` where the engine cannot read the graph.
        load: loads a prepared graph; a handle keeps other processes from removing its files, and
            the engine closes it when it is closed itself.
        load_source: loads a bundle's graph that could not be prepared.
    """

    facts: tuple[Any, ...]
    files: tuple[str, str]
    write: Callable[[Path, Path], None]
    load: Callable[[Path, int], AnyEngine]
    load_source: Callable[[Path], AnyEngine]


def prepared_engine(
    sha256: str,
    source: Callable[[], Path],
    recipe: Recipe[AnyEngine],
    *,
    confirm: Callable[[], None] | None = None,
    what: str = "a graph",
    quiet: bool = False,
) -> AnyEngine:
    """Return the engine of a graph, from the cache, or prepared and cached now.

    Without a usable cache (switched off, not private, read-only, disk full) the graph is loaded
    unprepared.

    Args:
        sha256: hash of the graph's files together, the key of the cache.
        source: checks the graph's files and returns the graph's path; called only where needed.
        recipe: how the graph is prepared and loaded.
        confirm: raises where the files changed since `source` checked them; called after the files
            were read and before the result is kept.
        what: the graph's name, for people.
        quiet: do not announce on standard error that a large graph is being prepared.
    """
    folder = _folder(sha256, recipe)
    if folder is not None:
        engine = _loaded(folder, recipe)
        if engine is not None:
            return engine
    path = source()
    if folder is not None and _prepare(path, folder, recipe, confirm, what, quiet=quiet):
        engine = _loaded(folder, recipe)
        if engine is not None:
            return engine
    engine = recipe.load_source(path)
    if confirm is not None:
        confirm()
    return engine


def _folder(sha256: str, recipe: Recipe[AnyEngine]) -> Path | None:
    root = private_folder(SESSIONS)
    return None if root is None else root / entry_name(json.dumps([sha256, *recipe.facts]))


def _loaded(folder: Path, recipe: Recipe[AnyEngine]) -> AnyEngine | None:
    """Return the engine of a prepared graph; None where it is not whole or was changed."""
    try:
        if why_not_private(folder) is not None:
            return None  # it is prepared again and replaced
        lock = hold(folder / STAMP, shared=True)
    except OSError:  # it does not exist, or is being removed
        return None
    try:
        seen = _checked(folder, recipe.files)
        engine = recipe.load(folder / recipe.files[0], lock)
        lock = -1  # the engine closes it
        if any(identity((folder / name).stat()) != known for name, known in seen.items()):
            raise EngineError(f"{folder} was changed while it was loaded")
        with contextlib.suppress(OSError):  # read-only
            os.utime(folder / STAMP)
    except (UserError, OSError, ValueError, TypeError, KeyError, AttributeError):
        return None  # forged, damaged or incomplete: it is prepared again and replaced
    finally:
        if lock >= 0:
            os.close(lock)
    return engine


def _checked(folder: Path, names: tuple[str, str]) -> dict[str, Identity]:
    """Compare a prepared graph's files with its stamp; return their identities.

    Raises:
        UserError, OSError, ValueError, TypeError, KeyError: a file differs, or the stamp is wrong.
    """
    stamp = json_from_file(folder / STAMP, error=EngineError)
    files: dict[str, Any] = stamp["files"]
    if not {names[0]} <= files.keys() <= set(names):
        raise ValueError("other files than a prepared graph has")
    small = sum((folder / name).lstat().st_size for name in files) <= _SMALL
    seen, changed = {}, False
    for name, entry in files.items():
        status = (folder / name).lstat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{name} is not a regular file")
        now = identity(status)
        known = Identity(*entry["identity"])
        if small or now != known:
            digest, now = sha256_of_file(folder / name)
            if digest != entry["sha256"]:
                raise ValueError(f"{name} was altered")
            changed = changed or now != known
            entry["identity"] = list(now)
        seen[name] = now
    if changed:  # copied or restored, with the same content: record the new identity
        with contextlib.suppress(UserError):
            write_whole(folder / STAMP, json.dumps(stamp).encode())
    return seen


def _prepare(
    path: Path,
    folder: Path,
    recipe: Recipe[AnyEngine],
    confirm: Callable[[], None] | None,
    what: str,
    *,
    quiet: bool,
) -> bool:
    """Prepare the graph in `folder`, whole or not at all; return whether `folder` may exist.

    Raises:
        UserError: `confirm` found the source files changed.
    """
    beside = (path, path.with_name(f"{path.name}.data"))
    size = sum(file.stat().st_size for file in beside if file.exists())
    if not make_room(size):
        return False
    try:
        with part_folder(folder) as part, _announced(what, size, part, quiet=quiet):
            recipe.write(path, part)
            if confirm is not None:
                confirm()
            files = {}
            for file in sorted(part.iterdir()):
                digest, seen = sha256_of_file(file)
                files[file.name] = {"sha256": digest, "identity": list(seen)}
            write_whole(part / STAMP, json.dumps({"what": what, "files": files}).encode())
            _move(part, folder, recipe)
    except EngineError:  # the caller loads the graph itself next, which reports why
        return False
    except OSError:
        return folder.exists()  # another process may have been faster
    return True


def _move(part: Path, folder: Path, recipe: Recipe[AnyEngine]) -> None:
    """Move a prepared graph to its place unless another process has put a good one there."""
    if folder.exists():
        engine = _loaded(folder, recipe)
        if engine is not None:
            engine.close()
            return
        with part_folder(folder) as aside:  # removed in the end, with the old graph
            folder.rename(aside / "old")
            part.rename(folder)
        return
    part.rename(folder)


@contextmanager
def _announced(what: str, size: int, part: Path, *, quiet: bool) -> Iterator[None]:
    """Announce the preparation of a large graph and show the bytes written so far."""
    if size < _LARGE or quiet:
        yield
        return
    root = part.parent
    print(
        f"note: preparing {what} for this processor, once: about {size / 1e9:.1f} GB in {root}, "
        "which sld-run --cache shows",
        file=sys.stderr,
    )
    done = threading.Event()

    def watch(bar: tqdm[Any]) -> None:
        while not done.wait(0.5):
            with contextlib.suppress(OSError):
                bar.update(sum(file.stat().st_size for file in part.iterdir()) - bar.n)

    with tqdm(
        total=size, unit="B", unit_scale=True, leave=False, file=sys.stderr, desc="preparing"
    ) as bar:
        thread = threading.Thread(target=watch, args=(bar,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
