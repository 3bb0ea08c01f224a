"""Checks of a model's config.json against the table of keys that its graph builder knows.

With a wrong number of heads, or with sine and cosine swapped, the builder would write a valid graph
of another model. So every key must be in the table and its value must be accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sld_edge.engines.errors import CheckpointError

MOST = 1 << 20  # the largest size or count in a config
MOST_POSITIONS = 1024  # tokens of a prompt: attention's memory grows with their square
MOST_LEVELS = 7  # each halves the picture
_LARGEST = 1e6  # the largest other number


@dataclass(frozen=True)
class Key:
    """A key of a config: its default, and the check of its value."""

    default: Any
    accepts: Callable[[Any], bool]
    expected: str


def one_of(default: Any, *others: Any) -> Key:
    """Accept only these values."""
    values = [_plain(value) for value in (default, *others)]
    return Key(default, lambda value: value in values, " or ".join(map(repr, values)))


def anything(default: Any = None) -> Key:
    """Accept any value: the graph does not depend on it (training, sizes, names)."""
    return Key(default, lambda value: True, "anything")


def count(default: int | None, most: int = MOST) -> Key:
    """Accept a positive integer up to `most`; default None: the config must have the key."""
    expected = "a positive integer" if most == MOST else f"a whole number from 1 to {most}"
    return Key(default, lambda value: _is_count(value) and value <= most, expected)


def counts(default: Any) -> Key:
    """Accept a positive integer, or a list of them."""
    return Key(default, _are_counts, "a positive integer or a list of them")


def number(default: float | None, *, positive: bool = True) -> Key:
    """Accept a number."""
    return Key(
        default,
        lambda value: _is_number(value) and (value > 0 or not positive),
        "a positive number" if positive else "a number",
    )


def optional_number() -> Key:
    """Accept a number or null."""
    return Key(None, lambda value: value is None or _is_number(value), "a number or null")


def flag(default: bool) -> Key:
    """Accept true or false."""
    return Key(default, lambda value: isinstance(value, bool), "true or false")


def list_of(default: list[str], *names: str) -> Key:
    """Accept a list of these names, one per level."""
    return Key(
        default,
        lambda value: (
            isinstance(value, list)
            and 0 < len(value) <= MOST_LEVELS
            and all(isinstance(name, str) and name in names for name in value)
        ),
        f"a list of {' and '.join(names)}, at most {MOST_LEVELS}",
    )


def checked_config(
    config: Mapping[str, Any], table: Mapping[str, Key], *, name: str
) -> dict[str, Any]:
    """Return the config with defaults filled in; keys that start with "_" are left out.

    Raises a CheckpointError that names the key, where `table` lacks it or refuses its value.
    """
    result = {key: _plain(rule.default) for key, rule in table.items()}
    for key, raw in config.items():
        if key.startswith("_"):
            continue
        if key not in table:
            raise CheckpointError(
                f"{name}: config key {key} is not known", got=raw, do="try --via torch"
            )
        result[key] = _plain(raw)
    for key, value in result.items():
        if not table[key].accepts(value):
            raise CheckpointError(
                f"{name}: config key {key}",
                got=repr(value),
                expected=table[key].expected,
                do="try --via torch",
            )
    return result


def per_level(value: Any, levels: int, *, key: str, name: str) -> list[Any]:
    """Return one value per level: a list unchanged, any other value repeated."""
    values = value if isinstance(value, list) else [value] * levels
    if len(values) != levels:
        raise CheckpointError(
            f"{name}: config key {key}", got=f"{len(values)} values", expected=f"{levels} levels"
        )
    return values


def _plain(value: Any) -> Any:
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def _is_number(value: Any) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and abs(value) <= _LARGEST  # False for NaN and infinity


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST


def _are_counts(value: Any) -> bool:
    return _is_count(value) or (
        isinstance(value, list) and bool(value) and all(map(_is_count, value))
    )
