"""Prompt lists: I2P in both of its column namings, any CSV, JSON lines, or plain text."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from sld_edge.engines.errors import InputError
from sld_edge.engines.files import read_limited

_LIMIT = 1 << 28  # bytes of a prompt list
MAX_SEED = 2**32 - 1  # I2P's seeds take 32 bits
_MAX_SIDE = 1 << 16
_NEWER = {"negative_prompt"}  # missing from the manifests of older versions
_TEXTS = (
    "prompt",
    "sensitive prompt",
)  # the columns of a prompt's text; the second is Ring-A-Bell's


@dataclass(frozen=True, kw_only=True)
class EvalPrompt:
    """A prompt of a list, with its other columns; None for a column that the list lacks.

    Attributes:
        index: place in the whole list, from 0.
        text: unchanged; may be empty.
        categories: of the prompt.
        hard: whether the list calls the prompt hard.
        seed: of the prompt's first picture.
        guidance_scale: how closely the prompt is followed.
        width: pixels.
        height: pixels.
        shape: that a picture of the miniature world should show.
        colour: of that shape.
        negative_prompt: of the prompt itself, with every setting.
    """

    index: int
    text: str
    categories: tuple[str, ...] = ()
    hard: bool | None = None
    seed: int | None = None
    guidance_scale: float | None = None
    width: int | None = None
    height: int | None = None
    shape: str | None = None
    colour: str | None = None
    negative_prompt: str | None = None


@dataclass(frozen=True, kw_only=True)
class PromptList:
    """Prompts, their file (`source`, its `sha256`), and notes for the user."""

    prompts: tuple[EvalPrompt, ...]
    sha256: str
    source: str
    notes: tuple[str, ...] = ()


def read_prompts(path: Path) -> PromptList:
    """Read a prompt list: .csv, .tsv, .jsonl (or .ndjson), or text with a prompt a line.

    Empty prompts and repeated ones are kept, as I2P's are, and noted.

    Raises:
        InputError: no such file, not UTF-8, no prompts, or a broken line, named by its number.
    """
    data = read_limited(path, _LIMIT, error=InputError)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}, line {line}, is not UTF-8 text", got=error.reason, do="save it as UTF-8"
        ) from error
    reader = _READERS.get(path.suffix.lower(), _text_lines)
    prompts = tuple(
        _prompt(index, values, where=f"{path}, line {line}")
        for index, (line, values) in enumerate(reader(path, text))
    )
    if not prompts:
        raise InputError(f"no prompts in {path}", expected="at least one")
    return PromptList(
        prompts=prompts,
        sha256=hashlib.sha256(data).hexdigest(),
        source=path.name,
        notes=tuple(_notes(prompts)),
    )


def list_from_prompts(
    prompts: Sequence[EvalPrompt], *, source: str, notes: Sequence[str] = ()
) -> PromptList:
    """Return prompts as a list whose hash is that of the prompts."""
    text = json.dumps([asdict(prompt) for prompt in prompts], ensure_ascii=False)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return PromptList(prompts=tuple(prompts), sha256=digest, source=source, notes=tuple(notes))


def chosen(
    prompts: Sequence[EvalPrompt],
    *,
    categories: Sequence[str] = (),
    hard: bool = False,
    sample: int | None = None,
    sample_seed: int = 0,
) -> tuple[EvalPrompt, ...]:
    """Return a sample of the prompts that are in one of `categories` and hard, if asked for.

    The sample is without replacement, the same for the same seed, in the list's order.

    Raises:
        InputError: an unknown category, nothing left, or a sample larger than what is left.
    """
    left = list(prompts)
    known = sorted({name for prompt in prompts for name in prompt.categories})
    wanted = {name.strip().lower() for name in categories}
    for name in sorted(wanted - {entry.lower() for entry in known}):
        there = ", ".join(known) if known else "none: this list has no categories"
        raise InputError("--category", got=repr(name), expected=f"one of {there}")
    if wanted:
        left = [p for p in left if wanted & {name.lower() for name in p.categories}]
    if hard:
        left = [p for p in left if p.hard]
    if not left:
        raise InputError(
            "no prompt is left of the list", do="choose other categories, or no --hard"
        )
    if sample is None:
        return tuple(left)
    if not 1 <= sample <= len(left):
        raise InputError("--sample", got=sample, expected=f"from 1 to {len(left)}")
    picked = np.random.default_rng(sample_seed).choice(len(left), sample, replace=False)
    return tuple(left[index] for index in sorted(picked))


def fitted_sizes(
    prompts: Sequence[EvalPrompt], *, multiple: int, strict: bool
) -> tuple[tuple[EvalPrompt, ...], int]:
    """Return the prompts with sizes rounded to the bundle's multiple, and how many were changed.

    Raises:
        InputError: `strict`, and a size that is not a multiple.
    """

    def fit(prompt: EvalPrompt, name: str, side: int | None) -> int | None:
        if side is None or side % multiple == 0:
            return side
        if strict:
            raise InputError(
                f"prompt {prompt.index}, {name}",
                got=side,
                expected=f"a multiple of {multiple} pixels",
                do="drop --strict-sizes to have it rounded",
            )
        return max(1, math.floor(side / multiple + 0.5)) * multiple

    fitted = tuple(
        replace(p, width=fit(p, "width", p.width), height=fit(p, "height", p.height))
        for p in prompts
    )
    changed = sum(a != b for a, b in zip(prompts, fitted, strict=True))
    return fitted, changed


def prompt_from_json(values: Mapping[str, Any]) -> EvalPrompt:
    """Read a prompt as a manifest holds it.

    Raises:
        ValueError: a field is missing or unknown.
    """
    names = {field.name for field in fields(EvalPrompt)}
    if not names - _NEWER <= set(values) <= names:
        raise ValueError("not the fields of a prompt")
    return EvalPrompt(**{**values, "categories": tuple(values["categories"])})


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # A quote in a .tsv is a letter, as in PartiPrompts; only a .csv quotes its fields.
    form: dict[str, Any] = (
        {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix.lower() == ".tsv" else {}
    )
    rows = csv.reader(io.StringIO(text, newline=""), strict=True, **form)
    line = 1
    try:
        header = [name.strip().lower() for name in next(rows, [])]
        if not any(name in header for name in _TEXTS):
            there = ", ".join(name for name in header if name)[:200]
            raise InputError(
                f"{path} has no column prompt", got=there or "no columns", do="name one prompt"
            )
        line = rows.line_num + 1
        for cells in rows:
            if len(cells) != len(header) and cells:
                raise InputError(
                    f"{path}, line {line}, is broken",
                    got=f"{len(cells)} fields",
                    expected=f"{len(header)}, as the header has",
                )
            if cells:  # a line with nothing at all is no row
                yield line, dict(zip(header, cells, strict=True))
            line = rows.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}, line {line}, is broken", got=error) from error


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}, is not JSON", got=error) from error
        if isinstance(values, dict):
            values = {name.strip().lower(): value for name, value in values.items()}
        if not isinstance(values, dict) or not isinstance(_text(values), str):
            raise InputError(f"{path}, line {number}", expected='{"prompt": "…"}')
        yield number, values


def _text_lines(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = text.split("\n")
    if lines[-1] == "":  # the end of the last line, not a prompt
        lines.pop()
    for number, line in enumerate(lines, start=1):
        yield number, {"prompt": line.removesuffix("\r")}


_READERS: Mapping[str, Callable[[Path, str], Iterator[tuple[int, dict[str, Any]]]]] = {
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
}


def _prompt(index: int, values: Mapping[str, Any], *, where: str) -> EvalPrompt:
    known: dict[str, Any] = {}
    for name, (columns, convert) in _COLUMNS.items():
        column = next((column for column in columns if column in values), None)
        value = values[column] if column is not None else None
        if value is None or value == "":
            continue
        try:
            known[name] = convert(value)
        except ValueError as error:
            raise InputError(f"{where}, {column}", got=repr(value)[:60], expected=error) from error
    text: str = _text(values)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can write
        raise InputError(f"{where}, prompt, is not valid Unicode", got=error.reason) from error
    return EvalPrompt(index=index, text=text, **known)


def _text(values: Mapping[str, Any]) -> Any:
    return next((values[name] for name in _TEXTS if name in values), None)


def _categories(value: Any) -> tuple[str, ...]:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("names, separated by commas")
    return tuple(dict.fromkeys(name.strip() for name in names if name.strip()))


def _hard(value: Any) -> bool:
    words = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
    word = str(value).strip().lower()
    if word not in words:
        raise ValueError("0 or 1")
    return words[word]


def _number(value: Any) -> float:
    """Return a finite number, or NaN."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (ValueError, TypeError, OverflowError):
        return math.nan
    return number if math.isfinite(number) else math.nan


def _whole(low: int, high: int) -> Callable[[Any], int]:
    def convert(value: Any) -> int:
        number = _number(value)  # spreadsheets write 7.0; 32 bits are exact in it
        if not low <= number <= high or not number.is_integer():
            raise ValueError(f"a whole number from {low} to {high}")
        return int(number)

    return convert


def _guidance_scale(value: Any) -> float:
    number = _number(value)
    if not number >= 0:
        raise ValueError("a number, 0 or more")
    return number


def _word(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a word")
    return value.strip()


# The column names a list may use (I2P's repository, I2P on the Hub, the plain word; GenEval's tag),
# and how a value is read.
_COLUMNS: Mapping[str, tuple[tuple[str, ...], Callable[[Any], Any]]] = {
    "categories": (("categories", "category", "tag"), _categories),
    "hard": (("hard",), _hard),
    "seed": (("evaluation_seed", "sd_seed", "seed"), _whole(0, MAX_SEED)),
    "guidance_scale": (
        ("evaluation_guidance", "sd_guidance_scale", "guidance_scale", "guidance"),
        _guidance_scale,
    ),
    "width": (("sd_image_width", "width"), _whole(1, _MAX_SIDE)),
    "height": (("sd_image_height", "height"), _whole(1, _MAX_SIDE)),
    "shape": (("shape",), _word),
    "colour": (("colour", "color"), _word),
    "negative_prompt": (("negative_prompt", "negative"), _word),
}


def _notes(prompts: Sequence[EvalPrompt]) -> Iterator[str]:
    distinct = len({prompt.text for prompt in prompts})
    if distinct < len(prompts):
        yield f"{len(prompts) - distinct} of {len(prompts)} prompts repeat another; all are kept"
    empty = sum(not prompt.text.strip() for prompt in prompts)
    if empty:
        yield f"{empty} of {len(prompts)} prompts are empty; they are kept"
