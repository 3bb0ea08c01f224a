"""Protobuf messages taken apart and put together, without a package: what a few edits need.

Source: protobuf's encoding, https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_VARINT, _BYTES = 0, 2  # wire types
_FIXED = {1: 8, 5: 4}  # bytes of a value, by wire type


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field of a message.

    Attributes:
        number: its number in the message's definition.
        value: what it holds: the bytes of a string or message, or of a number as it is encoded.
        whole: as it stands in the message, its tag included.
    """

    number: int
    value: bytes
    whole: bytes


def fields(message: bytes) -> Iterator[Field]:
    """Yield a message's fields in their order.

    Raises:
        IndexError, ValueError: not a whole message.
    """
    at = 0
    while at < len(message):
        start = at
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            _, end = _varint(message, at)
        elif kind == _BYTES:
            size, at = _varint(message, at)
            end = at + size
        elif kind in _FIXED:
            end = at + _FIXED[kind]
        else:
            raise ValueError(f"wire type {kind}")
        if end > len(message):
            raise ValueError("cut short")
        yield Field(number=number, value=message[at:end], whole=message[start:end])
        at = end


def spans(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Yield number and value of a message's fields, without a copy; bytes as a view.

    A value of fixed size is given as a view, too. Groups, which ONNX has none of, are refused.

    Raises:
        ValueError: not a whole message.
    """
    at, end = 0, len(message)
    while at < end:
        tag, at = _number(message, at)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            value, at = _number(message, at)
            yield number, value
            continue
        if kind == _BYTES:
            size, at = _number(message, at)
        elif kind in _FIXED:
            size = _FIXED[kind]
        else:
            raise ValueError(f"wire type {kind}")
        if number == 0 or size > end - at:
            raise ValueError("cut short")
        yield number, message[at : at + size]
        at += size


def values(message: bytes, number: int) -> list[bytes]:
    """Return what all fields of one number hold."""
    return [field.value for field in fields(message) if field.number == number]


def encoded(number: int, value: bytes | int) -> bytes:
    """Return a field of bytes or of an integer that is not negative, as it stands in a message."""
    if isinstance(value, int):
        return _as_varint(number << 3 | _VARINT) + _as_varint(value)
    return _as_varint(number << 3 | _BYTES) + _as_varint(len(value)) + value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Return a number and where it ends."""
    number = shift = 0
    while True:
        byte = message[at]
        number |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return number, at
        shift += 7


def _number(message: memoryview, at: int) -> tuple[int, int]:
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
