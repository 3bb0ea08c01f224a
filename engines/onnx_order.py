"""The order of nodes in an ONNX file, changed without the package onnx, which devices lack.

ONNX Runtime sorts nodes depth first, and of a node's inputs it computes the one that stands last in
the file first. A weight's cast that stands after what its consumer waits for is therefore computed
long before it is needed, and a whole model's casts are held at once. One that stands first in the
file is computed just before its consumer, so memory holds one at a time.

Source: protobuf's encoding, https://protobuf.dev/programming-guides/encoding, and onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sld_edge.engines.errors import EngineError

_GRAPH = 7  # field numbers of onnx.proto: of ModelProto,
_NODE, _INITIALIZER = 1, 5  # of GraphProto,
_INPUT = 1  # of NodeProto,
_NAME = 8  # and of TensorProto
_FIXED = {1: 8, 5: 4}  # bytes of a value, by wire type


@dataclass(frozen=True, kw_only=True)
class _Field:
    number: int
    value: bytes  # what it holds
    whole: bytes  # as it stands in the message, its tag included


def weights_first(model: bytes) -> bytes:
    """Return an ONNX file's bytes with the nodes that read weights alone before all others.

    Raises:
        EngineError: not an ONNX file.
    """
    try:
        return b"".join(
            _tagged(_GRAPH, _reordered(field.value)) if field.number == _GRAPH else field.whole
            for field in _fields(model)
        )
    except (IndexError, UnicodeDecodeError, ValueError) as error:
        raise EngineError("not a whole ONNX file", got=error) from error


def _reordered(graph: bytes) -> bytes:
    fields = list(_fields(graph))
    weights = {
        entry.value
        for field in fields
        if field.number == _INITIALIZER
        for entry in _fields(field.value)
        if entry.number == _NAME
    }

    def later(node: _Field) -> bool:
        inputs = [entry.value for entry in _fields(node.value) if entry.number == _INPUT]
        return not inputs or not weights.issuperset(inputs)

    nodes = sorted((field for field in fields if field.number == _NODE), key=later)
    rest = (field for field in fields if field.number != _NODE)
    return b"".join(field.whole for field in (*nodes, *rest))


def _fields(message: bytes) -> Iterator[_Field]:
    at = 0
    while at < len(message):
        start = at
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            _, end = _varint(message, at)
        elif kind == 2:
            size, at = _varint(message, at)
            end = at + size
        elif kind in _FIXED:
            end = at + _FIXED[kind]
        else:
            raise ValueError(f"wire type {kind}")
        if end > len(message):
            raise ValueError("cut short")
        yield _Field(number=number, value=message[at:end], whole=message[start:end])
        at = end


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


def _tagged(number: int, value: bytes) -> bytes:
    """Return a field of bytes, as it stands in a message."""
    return _as_varint(number << 3 | 2) + _as_varint(len(value)) + value


def _as_varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)
