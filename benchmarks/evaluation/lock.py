"""One process a shard: a lock file that names its holder, and outlives no process here."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sld_edge.engines.errors import InputError, OutputError

try:
    import fcntl
except ImportError:  # Windows: two takeovers of one dead lock at once are not kept apart
    fcntl = None  # type: ignore[assignment]  # a module elsewhere


@contextmanager
def shard_lock(folder: Path, shard: int, shards: int) -> Iterator[None]:
    """Hold a shard of a results folder, from 1 to `shards`, while the block runs.

    A lock whose process on this machine is gone is taken over. Another machine's cannot be looked
    into, so it must be removed by hand if that machine died.

    Raises:
        InputError: another process holds it, or works with another number of shards.
        OutputError: the lock cannot be written.
    """
    path = folder / f".lock-{shard}-of-{shards}"
    _take(path)
    try:
        for other in sorted(folder.glob(".lock-*-of-*")):
            if not other.name.endswith(f"-of-{shards}") and _alive(_holder(other)):
                raise InputError(
                    f"{folder} is being worked on with another number of shards",
                    got=f"--shard {shard}/{shards}",
                    expected=f"N/{other.name.rpartition('-')[2]}, as in {other}",
                    do="wait for it to end, or take a shard of its number",
                )
        yield
    finally:
        path.unlink(missing_ok=True)


def _take(path: Path) -> None:
    if _created(path):
        return
    with _alone(path.parent):  # so that of two that find a dead lock only one takes it over
        holder = _holder(path)
        if not _alive(holder):
            path.unlink(missing_ok=True)
            if _created(path):
                return
            holder = _holder(path)
    host = holder.get("host")
    here = host == socket.gethostname()
    raise InputError(
        f"another process is at work on {path.parent}",
        got=f"{path.name} of process {holder.get('pid')} on {host}",
        do="wait for it to end, or take another --shard"
        + ("" if here else f"; if that machine is gone, remove {path}"),
    )


def _created(path: Path) -> bool:
    """Write the lock whole under its name, if the name is free."""
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "start": _start()})
    own = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        own.write_text(text, encoding="utf-8")
        try:
            os.link(own, path)  # exclusive, and never empty to a reader
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            with path.open("x", encoding="utf-8") as stream:
                stream.write(text)
    except FileExistsError:
        return False
    except OSError as error:
        raise OutputError(f"cannot write {path}", got=error.strerror) from error
    finally:
        own.unlink(missing_ok=True)
    return True


def _holder(path: Path) -> dict[str, Any]:
    """Read a lock; one that is gone or unreadable has no holder."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _alive(holder: dict[str, Any]) -> bool:
    """Whether a lock's process may still be at work."""
    if not isinstance(holder.get("pid"), int):
        return False
    if holder.get("host") != socket.gethostname():
        return True  # not to be known from here
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return holder.get("start") in (None, _start(holder["pid"]))  # numbers are given out again


def _start(pid: int | None = None) -> str | None:
    """Return when a process started, in the system's own count; None where it does not say."""
    with suppress(OSError, IndexError):
        text = Path(f"/proc/{pid if pid is not None else os.getpid()}/stat").read_text()
        return text.rpartition(")")[2].split()[19]
    return None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    with (folder / ".takeover").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
