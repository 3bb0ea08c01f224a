"""Command-line options from a frozen dataclass: a field is an option, its type says how it is read.

@dataclass(frozen=True, kw_only=True)
class Settings:
    prompt: tuple[str, ...] = option("text of an image", "PROMPT", positional=True, nargs="*")
    steps: int | None = option("denoising steps", group="image")
    count: int = option("images a prompt", default=1)
    force: bool = flag("overwrite existing files")
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, field, fields
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from sld_edge.engines.errors import InputError

T = TypeVar("T")
REQUIRED = MISSING
"""The default of an option that must be given."""
_METAVARS: Mapping[Any, str] = {int: "N", float: "X", str: "NAME", Path: "PATH", Literal: "NAME"}


def option(
    help: str,
    metavar: str | None = None,
    *,
    default: Any = None,
    group: str | None = None,
    positional: bool = False,
    nargs: Literal["?", "*"] | None = None,
    action: Literal["append", "extend"] | None = None,
) -> Any:
    """Return a dataclass field that is an option.

    Args:
        help: its text; a default is added to it.
        metavar: the name of its value; None goes by its type.
        default: None for options that may be left out, `REQUIRED` for others.
        group: heading in the help, also of the fields after this one.
        positional: a word without a name.
        nargs: how many words a tuple takes, where that is not one or more.
        action: what an option given twice does; "append" takes one word each time.
    """
    metadata = {"help": help, "metavar": metavar, "group": group, "positional": positional}
    return field(default=default, metadata={**metadata, "nargs": nargs, "action": action})


def flag(help: str, *, default: bool = False) -> Any:
    """Return a dataclass field that is a switch: `--NAME`, or `--no-NAME` where it is on."""
    return option(help, default=default)


def add_options(
    cli: argparse.ArgumentParser, settings: type, *, required: Collection[str] = ()
) -> None:
    """Add a dataclass's fields to a parser, which leaves out of its answer what is not given.

    `required` names fields that must be given though they have a default.
    """
    place: Any = cli
    types = get_type_hints(settings)
    for own in fields(settings):
        meta, kind = own.metadata, types[own.name]
        if meta["group"] is not None:
            place = cli.add_argument_group(meta["group"])
        name = f"--{own.name.replace('_', '-')}"
        text = _help(meta["help"], own.default)
        words: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            name = f"--no-{name[2:]}" if own.default else name
            words["action"] = "store_false" if own.default else "store_true"
            place.add_argument(name, dest=own.name, **words)
            continue
        if get_origin(kind) in (Union, UnionType):
            kind = next(part for part in get_args(kind) if part is not NoneType)
        several = get_origin(kind) is tuple
        kind = get_args(kind)[0] if several else kind
        words |= {"metavar": meta["metavar"] or _METAVARS[get_origin(kind) or kind], "type": kind}
        if get_origin(kind) is Literal:
            words["type"] = partial(_choice, name, get_args(kind))
        if meta["action"] is not None:
            words["action"] = meta["action"]
        if meta["nargs"] is not None or (several and meta["action"] != "append"):
            words["nargs"] = meta["nargs"] or "+"
        if meta["positional"]:
            words["default"] = None  # argparse would read the word SUPPRESS
            place.add_argument(own.name, **words)
        else:
            must = own.default is REQUIRED or own.name in required
            place.add_argument(name, required=must, **words)


def settings_from_options(settings: type[T], given: Mapping[str, Any]) -> T:
    """Return a dataclass of the options given, by name; names that it lacks are left out."""
    names = {own.name for own in fields(settings)}  # type: ignore[arg-type]  # a dataclass
    return settings(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in given.items()
            if name in names
        }
    )


def parsed(cli: argparse.ArgumentParser, settings: type[T], words: Sequence[str] | None) -> T:
    """Return what the command line says, every default filled in."""
    return settings_from_options(settings, vars(cli.parse_args(words)))


def _help(text: str, default: Any) -> str:
    """Add the default to a text that does not name it; none, nothing and switches have none."""
    if "default: " in text or default is REQUIRED or isinstance(default, bool):
        return text
    values = default if isinstance(default, tuple) else [default]
    shown = " ".join(str(value) for value in values if value is not None)
    return f"{text} (default: {shown.removesuffix('.0')})" if shown else text


def _choice(name: str, choices: Sequence[str], word: str) -> str:
    if word not in choices:
        raise InputError(name, got=repr(word), expected="one of " + ", ".join(choices))
    return word
