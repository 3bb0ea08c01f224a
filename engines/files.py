"""Output files: whole or not there at all, and never over another without being told."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from sld_edge.engines.errors import OutputError


def check_writable(path: Path, *, force: bool) -> None:
    """Refuse, before any work is done, an output that could not be written in the end.

    Raises:
        OutputError: the file exists (without `force`), is a directory, or its folder is missing or
            not writable.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a directory", do="name a file")
    if path.exists() and not force:
        raise OutputError(f"{path} exists", do="choose another name, or add --force")
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"no such directory: {folder}", do="make it first")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write to {folder}", do="choose another place")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file beside its place and move it there, so that it appears whole.

    Raises:
        OutputError: it cannot be written, the disk being full for example; nothing is left.
    """
    part: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=".part", delete=False
        ) as stream:
            part = Path(stream.name)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        part.chmod(0o666 & ~_umask())
        part.replace(path)
        part = None
    except OSError as error:
        raise OutputError(
            f"cannot write {path}", got=error.strerror, do="make room, or choose another place"
        ) from error
    finally:
        if part is not None:  # also when interrupted
            part.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
