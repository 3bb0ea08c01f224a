"""The place of an exported folder: it appears whole, and replaces only a folder of its kind.

While a folder is replaced, the old folder is called `.NAME.XXXXXXXX.sld-old`. First the new folder
takes the name. Then files that the old manifest does not list move to the new folder. Then the old
folder is removed. If a command is killed meanwhile, the next command that writes there completes
these steps.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sld_edge.engines.errors import OutputError, UserError
from sld_edge.engines.files import umask
from sld_edge.engines.staging import part_folder
from sld_edge.runtime.manifest import File, file_entry


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of folder that is exported.

    Attributes:
        name: "bundle" or "scorer".
        manifest: name of the file that lists the other files.
        listed: returns the paths of all files of such a folder, with the manifest's; raises a
            UserError where the manifest is not valid.
        written: names that an export may write.
    """

    name: str
    manifest: str
    listed: Callable[[Path], Set[str]]
    written: Set[str]


def check_output(output: Path, *, force: bool, kind: Kind) -> None:
    """Refuse an output folder that cannot be written, before any work is done.

    Raises:
        OutputError: the folder exists (without `force`), is not of this kind, or holds an unlisted
            file under a name that the export writes.
    """
    recover(output, kind)
    if os.path.lexists(output):
        if not force:
            raise OutputError(f"{output} exists", do="choose another name, or add --force")
        _refuse_clashes(output, _unlisted_of(output, kind), kind.written)


def written(path: Path, data: bytes) -> File:
    """Write a file of a bundle, and return its entry in the manifest."""
    path.write_bytes(data)
    return file_entry(path)


@contextmanager
def staged(output: Path, *, force: bool, kind: Kind) -> Iterator[Path]:
    """Give a folder beside `output` that takes its place in the end; after an error it is removed.

    Raises:
        OutputError: the folder cannot be written, or `check_output` refuses `output` at the end.
    """
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with part_folder(output) as part:
            yield part
            check_output(output, force=force, kind=kind)  # again: an export takes long
            part.chmod(0o777 & ~umask())
            _replace(part, output, kind)
    except OSError as error:
        raise OutputError(
            f"cannot write {output}", got=error.strerror, do="make room, or choose another place"
        ) from error


def recover(output: Path, kind: Kind) -> None:
    """Complete the replacement that a killed command began: restore or remove the old folder.

    Raises:
        OutputError: the old folder cannot get its name back.
    """
    pattern = re.compile(rf"\.{re.escape(output.name)}\.[0-9a-f]{{8}}\.sld-old")
    with suppress(OSError):
        for name in sorted(os.listdir(output.parent)):
            if not pattern.fullmatch(name):
                continue
            old = output.with_name(name)
            if os.path.lexists(output):
                _retire(old, output, kind)
            elif (old / kind.manifest).exists():
                old.rename(output)


def _replace(part: Path, output: Path, kind: Kind) -> None:
    """Move a folder to its place; a folder that is there moves aside first."""
    old = output.with_name(f".{output.name}.{secrets.token_hex(4)}.sld-old")
    try:
        if output.exists():
            output.rename(old)
        part.rename(output)
    finally:
        if old.exists():
            if output.exists():
                _retire(old, output, kind)
            else:
                old.rename(output)


def _retire(old: Path, output: Path, kind: Kind) -> None:
    """Move the unlisted files of an old folder into the new folder, then remove the old folder.

    An unlisted file stays in the old folder where the new folder has a file of its name.
    """
    with suppress(UserError, OSError):
        listed = kind.listed(old) if os.path.lexists(old / kind.manifest) else frozenset()
        for path in list(_unlisted(old, listed)) if listed else ():
            place = output / path
            if not os.path.lexists(place):
                place.parent.mkdir(parents=True, exist_ok=True)
                (old / path).rename(place)
        root = old.resolve()
        for path in sorted(listed, key=lambda path: path == kind.manifest):  # the manifest last
            if (old / path).parent.resolve().is_relative_to(root):
                (old / path).unlink(missing_ok=True)
        for folder, _, _ in os.walk(old, topdown=False):
            os.rmdir(folder)


def _unlisted_of(output: Path, kind: Kind) -> list[str]:
    """Return the paths in a folder that its manifest does not list.

    Raises:
        OutputError: it is not a folder of this kind.
    """
    try:
        if output.is_dir() and not any(output.iterdir()):
            return []
        if not os.path.lexists(output / kind.manifest):
            raise OutputError(f"{output} is not a {kind.name}, so --force does not replace it")
        return list(_unlisted(output, kind.listed(output)))
    except OutputError:
        raise
    except (UserError, OSError) as error:
        raise OutputError(
            f"{output} is not a whole {kind.name}, so --force does not replace it",
            got=error,
            do="choose another name, or remove it by hand",
        ) from error


def _unlisted(root: Path, listed: Set[str], below: PurePosixPath | None = None) -> Iterator[str]:
    for entry in os.scandir(root if below is None else root / below):
        path = PurePosixPath(entry.name) if below is None else below / entry.name
        if not entry.is_dir(follow_symlinks=False):
            if str(path) not in listed:
                yield str(path)
        elif any(PurePosixPath(file).is_relative_to(path) for file in listed):
            yield from _unlisted(root, listed, path)
        else:
            yield str(path)


def _refuse_clashes(output: Path, unlisted: list[str], written: Set[str]) -> None:
    for path in unlisted:
        if PurePosixPath(path).parts[0] in written:
            raise OutputError(
                f"{output} holds a file of the same name as a new file, and does not list it",
                got=path,
                do="move that file away",
            )
