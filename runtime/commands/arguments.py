"""Command-line options from a frozen dataclass: a field is an option, its type is the value's type.

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
"""The default of an option that the user must give."""
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
        help: text in the help; the default is added to it.
        metavar: name of its value in the help; None is a name for its type.
        default: value of an option that is left out; `REQUIRED` if the user must give it.
        group: heading in the help for this field and the next fields.
        positional: a word without an option name.
        nargs: how many words a tuple takes; None is one or more.
        action: treatment of an option that is given twice; "append" takes one word each time.
    """
    metadata = {"help": help, "metavar": metavar, "group": group, "positional": positional}
    return field(default=default, metadata={**metadata, "nargs": nargs, "action": action})


def flag(help: str, *, default: bool = False) -> Any:
    """Return a dataclass field that is a switch: `--NAME`, or `--no-NAME` where it is on."""
    return option(help, default=default)


def add_options(
    cli: argparse.ArgumentParser, settings: type, *, required: Collection[str] = ()
) -> None:
    """Add a dataclass's fields to a parser; its result has only the options that the user gave.

    `required` names fields that the user must give although they have a default.
    """
    place: Any = cli
    types = get_type_hints(settings)
    for item in fields(settings):
        meta, kind = item.metadata, types[item.name]
        if meta["group"] is not None:
            place = cli.add_argument_group(meta["group"])
        name = f"--{item.name.replace('_', '-')}"
        text = _help(meta["help"], item.default)
        words: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
        if kind is bool:
            name = f"--no-{name[2:]}" if item.default else name
            words["action"] = "store_false" if item.default else "store_true"
            place.add_argument(name, dest=item.name, **words)
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
            words["default"] = None  # argparse would take SUPPRESS for a word of the user
            place.add_argument(item.name, **words)
        else:
            must = item.default is REQUIRED or item.name in required
            place.add_argument(name, required=must, **words)


def settings_from_options(settings: type[T], given: Mapping[str, Any]) -> T:
    """Return a dataclass with the given options, by name; unknown names are ignored."""
    names = {item.name for item in fields(settings)}  # type: ignore[arg-type]  # a dataclass
    return settings(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in given.items()
            if name in names
        }
    )


def parsed(cli: argparse.ArgumentParser, settings: type[T], words: Sequence[str] | None) -> T:
    """Return the settings of a command line, with defaults for options that are left out."""
    return settings_from_options(settings, vars(cli.parse_args(words)))


def _help(text: str, default: Any) -> str:
    """Add the default to a text without a default; None, () and switches are not added."""
    if "default: " in text or default is REQUIRED or isinstance(default, bool):
        return text
    values = default if isinstance(default, tuple) else [default]
    shown = " ".join(str(value) for value in values if value is not None)
    return f"{text} (default: {shown.removesuffix('.0')})" if shown else text


def _choice(name: str, choices: Sequence[str], word: str) -> str:
    if word not in choices:
        raise InputError(name, got=repr(word), expected="one of " + ", ".join(choices))
    return word
