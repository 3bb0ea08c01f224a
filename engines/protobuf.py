"""Protobuf messages read and written without a package, as far as ONNX files need it.

Source: protobuf's encoding, https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

_VARINT, _BYTES = 0, 2  # wire types
_FIXED = {1: 8, 5: 4}  # bytes of a value, by wire type


class Field(NamedTuple):
    """One field of a message.

    Attributes:
        number: its number in the message's definition.
        value: the bytes of a string or message, or of a number as it is encoded.
        whole: the field as it stands in the message, its tag included.
    """

    number: int
    value: bytes
    whole: bytes


def fields(message: bytes) -> Iterator[Field]:
    """Yield a message's fields in their order.

    Raises:
        ValueError: not a whole message.
    """
    for number, _, start, begin, end in _walk(message):
        yield Field(number, message[begin:end], message[start:end])


def spans(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Yield number and value of a message's fields: bytes as a view, without a copy.

    A value of fixed size is a view, too.

    Raises:
        ValueError: not a whole message.
    """
    for number, kind, _, begin, end in _walk(message):
        yield number, _number(message, begin)[0] if kind == _VARINT else message[begin:end]


def values(message: bytes, number: int) -> list[bytes]:
    """Return the values of all fields of one number."""
    return [field.value for field in fields(message) if field.number == number]


def encoded(number: int, value: bytes | int) -> bytes:
    """Return a field of bytes or of an integer that is not negative, as it stands in a message."""
    if isinstance(value, int):
        return _as_varint(number << 3 | _VARINT) + _as_varint(value)
    return _as_varint(number << 3 | _BYTES) + _as_varint(len(value)) + value


def _walk(message: bytes | memoryview) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield each field's number and wire type, and where field, value and next field start.

    Groups are refused: ONNX has none.
    """
    start, end = 0, len(message)
    while start < end:
        tag, begin = _number(message, start)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            _, after = _number(message, begin)
        elif kind == _BYTES:
            size, begin = _number(message, begin)
            after = begin + size
        elif kind in _FIXED:
            after = begin + _FIXED[kind]
        else:
            raise ValueError(f"wire type {kind}")
        if number == 0 or after > end:
            raise ValueError("cut short")
        yield number, kind, start, begin, after
        start = after


def _number(message: bytes | memoryview, at: int) -> tuple[int, int]:
    """Return a number of at most 64 bits and where it ends."""
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        byte = message[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
    raise ValueError("cut short, or a number of more than 64 bits")


def _as_varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)
