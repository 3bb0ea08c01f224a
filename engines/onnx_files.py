"""The other files that an ONNX file names, read without running it and without the package onnx.

ONNX Runtime before 1.24.1 opens any path that a graph gives for its weights. So every place where a
graph can hold a tensor is checked before a runtime sees the file.

Field numbers are from onnx.proto.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sld_edge.engines.protobuf import spans

GRAPH_LIMIT = 2 << 30  # bytes; protobuf's own limit for a message
_DEPTH = 32  # messages inside messages
_NODE, _TENSOR = "node", "tensor"
_INPUT, _OP_TYPE, _DOMAIN = 1, 4, 7  # of NodeProto
_EXTERNAL_DATA = 13  # of TensorProto
_KEY, _VALUE = 1, 2  # of StringStringEntryProto

# Every field that holds a message in which a tensor or a node can lie, by the message's kind.
_INSIDE: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: _NODE, 11: "attribute"},
    "graph": {1: _NODE, 5: _TENSOR, 15: "sparse"},
    _NODE: {5: "attribute"},
    "attribute": {5: _TENSOR, 6: "graph", 10: _TENSOR, 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: _TENSOR, 2: _TENSOR},
    _TENSOR: {},
}
_DOMAINS = frozenset({"", "ai.onnx", "com.microsoft", "ai.onnx.ml"})
_READS_FILES = frozenset({"EPContext"})  # operators that open files by themselves


@dataclass(frozen=True, kw_only=True)
class External:
    """The bytes of another file that hold a tensor; `length` None: to the end of that file."""

    location: str
    offset: int
    length: int | None


def externals(model: memoryview) -> Iterator[External]:
    """Yield the external data that the tensors of an ONNX file name.

    Raises:
        ValueError: not a whole ONNX file, a wrong entry of external data, or a node whose operator
            opens files or comes from a library.
    """
    functions = {
        _text(value)
        for number, value in spans(model)
        if number == 25
        for inner, value in spans(_message(value))
        if inner == 10  # FunctionProto's domain: the model defines it
    }
    yield from _externals("model", model, _DEPTH, _DOMAINS | functions)


def _externals(
    kind: str, message: memoryview, depth: int, domains: frozenset[str]
) -> Iterator[External]:
    if not depth:
        raise ValueError("messages inside messages without end")
    inside = _INSIDE[kind]
    entries: list[tuple[str, str]] = []
    operator, last_input = "", "given"
    for number, value in spans(message):
        if number in inside:
            yield from _externals(inside[number], _message(value), depth - 1, domains)
        elif kind == _TENSOR and number == _EXTERNAL_DATA:
            entries.append(_entry(_message(value)))
        elif kind == _NODE and number == _INPUT:
            last_input = _text(value)
        elif kind == _NODE and number == _OP_TYPE:
            operator = _text(value)
        elif kind == _NODE and number == _DOMAIN and _text(value) not in domains:
            raise ValueError(f"an operator of {_text(value)!r}, which no engine here has")
    if operator in _READS_FILES:
        raise ValueError(f"operator {operator}, which opens files")
    if operator.endswith("Normalization") and not last_input:
        # ONNX Runtime's fusions read it all the same, and the process dies.
        raise ValueError(f"operator {operator} with an input that has no name")
    if entries:
        yield _external(entries)


def _external(entries: list[tuple[str, str]]) -> External:
    data = dict(entries)
    if len(data) < len(entries) or not data.keys() >= {"location"}:
        raise ValueError("a tensor that names its file twice, or none")
    if not data.keys() <= {"location", "offset", "length", "checksum"}:
        raise ValueError(f"external data with {', '.join(sorted(data))}")
    length = data.get("length")
    return External(
        location=data["location"],
        offset=_number(data.get("offset", "0")),
        length=None if length is None else _number(length),
    )


def _entry(message: memoryview) -> tuple[str, str]:
    texts = {number: _text(value) for number, value in spans(message)}
    return texts.get(_KEY, ""), texts.get(_VALUE, "")


def _message(value: memoryview | int) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message belongs")
    return value


def _text(value: memoryview | int) -> str:
    return bytes(_message(value)).decode("utf-8")


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise ValueError(f"{text[:20]!r} where a number of bytes belongs")
    return int(text)
