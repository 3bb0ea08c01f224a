"""Files: input from outside is checked as it is read; output appears whole or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sld_edge.engines.errors import OutputError, UserError, one_line
from sld_edge.engines.staging import part_file

_CHUNK = 1 << 20  # bytes read at once
JSON_LIMIT = 64 << 20  # bytes; the largest tokenizer.json known has 9 million
_NPY_HEADER = re.compile(
    rb"\{'descr': '<f4', 'fortran_order': False, 'shape': \(((?:\d{1,9}, ?)*\d{0,9})\), \} *\n"
)


class Identity(NamedTuple):
    """Values of a file that show whether it has changed since it was read.

    Only the system sets `changed`. It changes when the file's content or times change, and when
    another file takes its name.
    """

    device: int
    inode: int
    size: int
    modified: int
    changed: int


def identity(status: os.stat_result) -> Identity:
    """Return a file's identity from `os.stat` or `os.fstat`."""
    return Identity(
        status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    )


@contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """Open a regular file for reading; never wait for a pipe or read a device.

    Raises:
        OSError: the file cannot be opened, or is not a regular file.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # asked first: opening a device can act on it
            raise OSError(0, "not a regular file")
        handle = os.open(path, flags | getattr(os, "O_CLOEXEC", 0))
    except ValueError as error:  # a NUL in the name
        raise OSError(0, str(error)) from error
    with os.fdopen(handle, "rb") as stream:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(0, "not a regular file")
        yield stream


def read_limited(path: Path, limit: int, *, error: type[UserError], do: str | None = None) -> bytes:
    """Return a regular file's bytes, at most `limit`.

    Args:
        path: the file.
        limit: the most bytes that the file may have.
        error: the class to raise.
        do: advice that the error ends with.

    Raises:
        UserError: of the class `error`: no such file, not a regular file, or too large.
    """
    try:
        with opened(path) as stream:
            data = stream.read(limit + 1)
    except OSError as problem:
        raise error(f"cannot read {path}", got=problem.strerror, do=do) from problem
    if len(data) > limit:
        raise error(f"{path} is too large", expected=f"at most {limit} bytes", do=do)
    return data


def json_from_file(
    path: Path, *, error: type[UserError], do: str | None = None, limit: int = JSON_LIMIT
) -> dict[str, Any]:
    """Read a file that holds one JSON object; see `json_from_bytes` and `read_limited`."""
    return json_from_bytes(
        read_limited(path, limit, error=error, do=do), origin=str(path), error=error, do=do
    )


def json_from_bytes(
    data: bytes, *, origin: str, error: type[UserError], do: str | None = None
) -> dict[str, Any]:
    """Return the JSON object that `data` holds.

    Besides invalid JSON it refuses every value but an object, a key given twice, NaN, numbers that
    are too large or have thousands of digits, nesting beyond Python's depth, and text that is not
    Unicode. The name Infinity is allowed: diffusers writes it into scheduler configurations.

    Args:
        data: UTF-8 text.
        origin: its name in error messages, for example a path.
        error: the class to raise.
        do: advice that the error ends with.

    Raises:
        UserError: of the class `error`.
    """
    try:
        body = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_object,
            parse_float=_finite,
            parse_constant=_infinity,
        )
        json.dumps(body, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair fails
    except (ValueError, RecursionError, OverflowError) as problem:
        raise error(f"{origin} is not whole JSON", got=one_line(problem), do=do) from problem
    if not isinstance(body, dict):
        raise error(f"{origin}", got=type(body).__name__, expected="a JSON object", do=do)
    return body


def floats_from_npy(data: bytes) -> NDArray[np.float32]:
    """Return the array of an `.npy` file that holds little-endian float32 in C order, any shape.

    NumPy's own reader evaluates the header as Python and accepts pickles, zip files and sizes
    without limit, so the header is read here, exactly as NumPy writes it.

    Raises:
        ValueError: another kind of file, dtype or order, or the file is cut short.
    """
    if data[:6] != b"\x93NUMPY" or data[6:8] != b"\x01\x00":
        raise ValueError("not an .npy file of version 1.0")
    start = 10 + int.from_bytes(data[8:10], "little")
    header = _NPY_HEADER.fullmatch(data[10:start])
    if header is None:
        raise ValueError("not an .npy header of float32 in C order")
    shape = tuple(int(size) for size in re.findall(rb"\d+", header[1]))
    if math.prod(shape) * 4 != len(data) - start:
        raise ValueError(f"{len(data) - start} bytes for float32 {shape}")
    return np.frombuffer(data, "<f4", offset=start).reshape(shape).astype(np.float32)


def npy_from_floats(array: NDArray[np.float32]) -> bytes:
    """Return a float32 array as the bytes of an `.npy` file, which `floats_from_npy` reads."""
    stream = io.BytesIO()
    np.save(stream, array.astype(np.float32, copy=False))
    return stream.getvalue()


def sha256_of_file(path: Path) -> tuple[str, Identity]:
    """Return a regular file's SHA-256 and its identity.

    Raises:
        OSError: the file cannot be read, is not a regular file, or changed while it was read.
    """
    with opened(path) as stream:
        before = identity(os.fstat(stream.fileno()))
        digest = hashlib.sha256()
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
        if identity(os.fstat(stream.fileno())) != before:
            raise OSError(0, "changed while it was read")
    return digest.hexdigest(), before


def require_unchanged(
    seen: Mapping[Path, Identity], *, error: type[UserError], do: str | None = None
) -> None:
    """Check that files did not change while a library read them.

    Raises:
        UserError: of the class `error`: a file was changed or replaced since it was `seen`.
    """
    for path, before in seen.items():
        try:
            now = identity(path.stat())
        except OSError:
            now = None
        if now != before:
            raise error(f"{path} was changed while it was loaded", do=do)


def check_writable(path: Path, *, force: bool) -> None:
    """Refuse an output file that cannot be written, before any work is done.

    Raises:
        OutputError: the file exists (without `force`), is a directory, its name is too long, or its
            folder is missing or not writable.
    """
    try:
        path.lstat()
        exists = True
    except FileNotFoundError:
        exists = False
    except (OSError, ValueError) as error:
        raise OutputError(f"cannot write {path}", got=one_line(error), do="name a file") from error
    if path.is_dir():
        raise OutputError(f"{path} is a directory", do="name a file")
    if exists and not force:
        raise OutputError(f"{path} exists", do="choose another name, or add --force")
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"no such directory: {folder}", do="make it first")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"cannot write to {folder}", do="choose another place")


def write_whole(path: Path, data: bytes, *, replace: bool = True) -> None:
    """Write a file beside its place and move it there, so that it appears whole.

    Args:
        path: the file's place.
        data: its content.
        replace: whether to replace an existing file. If not, an existing file is an error, even
            where another process makes it at the same time.

    Raises:
        OutputError: the file cannot be written, for example because the disk is full, or it exists
            already; no part of it is left.
    """
    try:
        with part_file(path) as (part, stream):
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
            part.chmod(0o666 & ~umask())
            if os.name == "nt":
                stream.close()  # Windows moves no open file
            if replace:
                part.replace(path)
            else:
                _place_new(part, path)
    except FileExistsError as error:
        raise OutputError(f"{path} exists", do="choose another name, or add --force") from error
    except OSError as error:
        raise OutputError(
            f"cannot write {path}", got=error.strerror, do="make room, or choose another place"
        ) from error


def _place_new(part: Path, path: Path) -> None:
    """Move a finished file to `path`.

    Raises:
        FileExistsError: a file of this name exists.
    """
    try:
        os.link(part, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: reserve the name, then take it
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        part.replace(path)


def umask() -> int:
    """Return the permissions that this process withholds from new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) < len(pairs):
        raise ValueError("a key is given twice")
    return body


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


def _infinity(text: str) -> float:
    if text == "NaN":
        raise ValueError("NaN is no number")
    return float(text)
