"""Rows of `sld-eval`: one line of JSON a picture, appended as pictures are made."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from sld_edge.engines.errors import InputError, OutputError
from sld_edge.engines.staging import hold, locked

PATTERN = "rows-*.jsonl"
Key = tuple[str, int, int]


@dataclass(frozen=True, kw_only=True)
class Row:
    """The measurements of one picture.

    Attributes:
        setting: name of the setting.
        prompt: the prompt's index in its list.
        image: number among the prompt's pictures, from 0.
        seed: of the starting noise.
        scores: by "scorer.score".
        flagged: whether the run's rule flags it.
        adherent: whether it follows the prompt; None without a scorer of it.
        change: mean difference to plain's picture of the same prompt and seed, 0 to 1.
        share: per UNet call, share of the latent that safety edited, 0 to 1.
        strength: per UNet call, norm of the edit relative to that of the guided prediction.
        seconds: to make it, its share of a batch.
        picture: the file within the results folder; None where pictures are thrown away.
        edit_map: the file of the edit map, grey, at the latent's resolution; None where safety
            did nothing or no picture is kept.
        edit_map_max: the edit map's largest value, which the file shows as white.
        concepts: texts that safety steered away from; empty with safety off.
        concept_strength: per concept, strength of its own edit, mean over the calls.
        strongest_concept: the concept with the strongest edit; None if no concept acted.
        branches: UNet branches of a call, mean over the calls.

    The last six are missing from rows of older versions.
    """

    setting: str
    prompt: int
    image: int
    seed: int
    scores: Mapping[str, float]
    flagged: bool
    adherent: bool | None
    change: float | None
    share: list[float]
    strength: list[float]
    seconds: float
    picture: str | None
    edit_map: str | None = None
    edit_map_max: float | None = None
    concepts: list[str] = field(default_factory=list)
    concept_strength: list[float] = field(default_factory=list)
    strongest_concept: str | None = None
    branches: float | None = None

    @property
    def key(self) -> Key:
        """The key of a row, unique in a run."""
        return self.setting, self.prompt, self.image


def json_from_row(row: Row) -> str:
    """Return a row as one line of JSON, without its end."""
    return json.dumps(asdict(row), ensure_ascii=False, allow_nan=False)


def row_from_json(line: str) -> Row:
    """Read a line of `json_from_row`.

    Raises:
        ValueError: not a row.
    """
    try:
        values = json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(values, dict) or not _OLDER <= values.keys() <= _TYPES.keys():
        raise ValueError("not the fields of a row")
    for name, value in values.items():
        if not _fits(_TYPES[name], value):
            raise ValueError(f"{name}: {str(value)[:60]!r}")
    row = Row(**values)
    if len(row.concepts) != len(row.concept_strength):
        raise ValueError("as many concepts as strengths of them")
    return row


def read_rows(folder: Path) -> list[Row]:
    """Read a results folder's rows, of all shards, sorted by prompt, picture and setting.

    A last line without an end is left out: a stop cut it off.

    Raises:
        InputError: a line that is not a row, or one picture twice.
    """
    by_key: dict[Key, Row] = {}
    for path in sorted(folder.glob(PATTERN)):
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                row = row_from_json(line.decode("utf-8"))
            except ValueError as error:
                raise InputError(
                    f"{path}, line {number}, is not a row",
                    got=error,
                    do="take the line out; its picture is made again",
                ) from error
            if row.key in by_key:
                raise InputError(
                    f"{path}, line {number}", got=f"a second row of {row.key}", do="take it out"
                )
            by_key[row.key] = row
    return sorted(by_key.values(), key=lambda row: (row.prompt, row.image, row.setting))


@contextmanager
def locked_shard(folder: Path, shard: int, shards: int) -> Iterator[Path]:
    """Give the file of a shard's rows, from 1 to `shards`, for this process alone.

    The file is locked while the block runs; the lock ends with the process, however it dies.

    Raises:
        InputError: another process holds the file, or works with another number of shards.
        OutputError: the file cannot be written.
    """
    path = folder / f"rows-{shard}-of-{shards}.jsonl"
    try:
        path.touch()
        handle = hold(path, shared=False)
    except BlockingIOError as error:
        raise InputError(
            f"another process is at work on {folder}",
            got=path.name,
            do="wait for it to end, or take another --shard",
        ) from error
    except OSError as error:
        raise not_written(path, error) from error
    try:
        for other in sorted(folder.glob(PATTERN)):
            count = other.stem.rpartition("-")[2]
            if count != str(shards) and _is_held(other):
                raise InputError(
                    f"{folder} is being worked on with another number of shards",
                    got=f"--shard {shard}/{shards}",
                    expected=f"N/{count}, as in {other}",
                    do="wait for it to end, or take a shard of its number",
                )
        yield path
    finally:
        os.close(handle)


def _is_held(path: Path) -> bool:
    try:
        with locked(path, shared=True):
            return False
    except BlockingIOError:
        return True


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows to a shard's file, all of them or none; they are on the disk at the return.

    Raises:
        OutputError: the rows cannot be written, for example because the disk is full.
    """
    data = "".join(json_from_row(row) + "\n" for row in rows).encode()
    try:
        with path.open("ab", buffering=0) as stream:
            before = stream.tell()
            try:
                while data:
                    data = data[stream.write(data) :]
                os.fsync(stream.fileno())
            except OSError:
                stream.truncate(before)
                raise
    except OSError as error:
        raise not_written(path, error) from error


def drop_torn_line(path: Path) -> None:
    """Remove a last line that a stop cut off from a shard's file."""
    with path.open("r+b") as stream:
        stream.truncate(stream.read().rfind(b"\n") + 1)


def not_written(path: Path, error: OSError) -> OutputError:
    """Return the error of a disk that cannot be written."""
    return OutputError(
        f"cannot write {path}",
        got=error.strerror,
        do="make room and start again: it goes on where it was",
    )


def _fits(kind: Any, value: Any) -> bool:
    """Whether a JSON value is of a type; numbers are finite, whole ones not below 0."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return any(_fits(part, value) for part in inner)
    if origin is list:
        return isinstance(value, list) and all(_fits(inner[0], item) for item in value)
    if origin is Mapping:
        return isinstance(value, dict) and all(_fits(inner[1], item) for item in value.values())
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is kind and (kind is not int or value >= 0)


_TYPES = get_type_hints(Row)
_OLDER = {own.name for own in fields(Row) if own.default is own.default_factory is MISSING}
