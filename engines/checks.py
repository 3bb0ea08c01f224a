"""Checks of numbers and texts from a caller.

The functions return values of the exact built-in types. So a subclass with its own comparisons or
conversions cannot give another value after the check.
"""

from __future__ import annotations

import math
import operator

import numpy as np

from sld_edge.engines.errors import InputError


def whole_number(name: str, value: object, least: int, most: int) -> int:
    """Return a whole number from `least` to `most` as an exact int; NumPy's integers count.

    Raises:
        InputError: another type, bool and text included, or a number outside.
    """
    expected = f"a whole number from {least} to {most}"
    if isinstance(value, bool | np.bool_):
        raise InputError(name, got=shown(value), expected=expected)
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # a TypeError is caught
    except TypeError:
        raise InputError(name, got=shown(value), expected=expected) from None
    if not least <= number <= most:
        raise InputError(name, got=_digits(number), expected=expected)
    return number


def finite_number(name: str, value: object, least: float, most: float) -> float:
    """Return a number from `least` to `most` as an exact float; NumPy's numbers count.

    Raises:
        InputError: another type, bool and text included, NaN, infinity, or a number outside.
    """
    expected = f"a number from {least:g} to {most:g}"
    number = math.nan
    if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
    if not least <= number <= most:  # NaN is outside, too
        raise InputError(name, got=shown(value), expected=expected)
    return number


def exact_text(name: str, value: object) -> str:
    """Return a text as an exact str.

    Raises:
        InputError: another type, or text that is not valid Unicode (half of a surrogate pair).
    """
    if not isinstance(value, str):
        raise InputError(name, got=type(value).__name__, expected="text")
    text = str.__getitem__(value, slice(None))  # not the subclass
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{name} is not valid Unicode text", got=error.reason) from error
    return text


def shown(value: object) -> str:
    """Return a value as Python writes it, or the name of its type where that fails."""
    try:
        return repr(value)
    except Exception:  # an int of thousands of digits inside, or a class of the caller's own
        return type(value).__name__


def _digits(number: int) -> str:
    """Return a whole number as text; Python refuses to print thousands of digits."""
    return str(number) if number.bit_length() < 128 else f"a number of {number.bit_length()} bits"
