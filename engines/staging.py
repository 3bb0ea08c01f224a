"""Unfinished files and folders: locked by their process, removed after its death.

An unfinished file or folder, a part, is called `.NAME.XXXXXXXX.sld-part` and lies beside its final
place. Its process holds a lock (flock) on it, which ends with the process, however it dies. So the
next process that writes to the folder can tell which parts are left over, and removes them.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_PART = re.compile(r"\..+\.[0-9a-f]{8}\.sld-part")
_OLD_ENOUGH = 24 * 3600.0  # seconds; where there are no locks, an older part is left over
_swept: set[str] = set()
_LONGEST = 200  # characters of a name that are kept in the part's name


@contextmanager
def part_file(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Give a new, locked, empty file beside `path`; unless moved, it is removed in the end.

    Raises:
        OSError: the file cannot be made.
    """
    folder = os.path.abspath(path.parent)
    if folder not in _swept:  # once a process: a folder may hold thousands of pictures
        _swept.add(folder)
        sweep(path.parent)
    part, handle = _new_part(path, lambda part: part.touch(mode=0o600, exist_ok=False), os.O_RDWR)
    assert handle is not None
    try:
        with os.fdopen(handle, "wb") as stream:
            yield part, stream
    finally:
        part.unlink(missing_ok=True)  # also when interrupted


@contextmanager
def part_folder(path: Path) -> Iterator[Path]:
    """Give a new, locked, empty folder beside `path`, for this user alone; removed in the end.

    Rename it to keep it.

    Raises:
        OSError: the folder cannot be made.
    """
    sweep(path.parent)
    part, handle = _new_part(path, lambda part: part.mkdir(mode=0o700), os.O_RDONLY)
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def sweep(folder: Path) -> None:
    """Remove the parts that dead processes left in a folder, as far as they can be removed."""
    with suppress(OSError):
        for name in os.listdir(folder):
            if _PART.fullmatch(name):
                _sweep_one(folder / name)


@contextmanager
def locked(path: Path, *, shared: bool) -> Iterator[None]:
    """Hold a lock on a file, shared with other processes or alone.

    Raises:
        OSError: the file does not exist, or another process holds a lock that excludes this one.
    """
    handle = hold(path, shared=shared)
    try:
        yield
    finally:
        os.close(handle)


def hold(path: Path, *, shared: bool) -> int:
    """Lock a file until the returned handle is closed; see `locked`."""
    handle = os.open(path, os.O_RDONLY)
    try:
        _lock(handle, shared=shared)
    except BlockingIOError:
        os.close(handle)
        raise
    return handle


def _new_part(path: Path, make: Callable[[Path], object], flags: int) -> tuple[Path, int | None]:
    """Make a part and lock it; retry where a sweep removed it before it was locked."""
    name = path.name.encode()[:_LONGEST].decode(errors="ignore")
    while True:
        part = path.with_name(f".{name}.{secrets.token_hex(4)}.sld-part")
        make(part)
        if fcntl is None and part.is_dir():
            return part, None  # Windows opens no folders
        handle = None
        try:
            handle = os.open(part, flags | getattr(os, "O_BINARY", 0))
            _lock(handle, shared=False)
            if os.path.samestat(os.stat(part), os.fstat(handle)):
                return part, handle
        except (BlockingIOError, FileNotFoundError):  # a sweep was faster
            pass
        except BaseException:
            _remove(part)
            raise
        if handle is not None:
            os.close(handle)


def _lock(handle: int, *, shared: bool) -> None:
    """Take a lock; on a file system without locks the file is used unlocked.

    Raises:
        BlockingIOError: another process holds a lock that excludes this one.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass


def _sweep_one(part: Path) -> None:
    """Remove a part that no living process holds; its maker cannot lock it meanwhile."""
    with suppress(OSError):  # in use, gone, of another user, or no locks here
        status = part.lstat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            return
        if fcntl is None:
            if time.time() - status.st_mtime > _OLD_ENOUGH:
                _remove(part)
            return
        handle = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(part)
        finally:
            os.close(handle)


def _remove(part: Path) -> None:
    with suppress(OSError):
        if part.is_dir() and not part.is_symlink():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink()
