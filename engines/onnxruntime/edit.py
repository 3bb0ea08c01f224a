"""Edits of ONNX files for ONNX Runtime on the CPU, without the package onnx, which devices lack.

Field numbers are from onnx.proto.
"""

from __future__ import annotations

from collections.abc import Callable

from sld_edge.engines.errors import EngineError
from sld_edge.engines.protobuf import Field, encoded, fields, values

_GRAPH, _OPSET = 7, 8  # of ModelProto,
_NODE, _INITIALIZER = 1, 5  # of GraphProto,
_TENSOR_NAME = 8  # of TensorProto,
_INPUT, _OUTPUT, _OP_TYPE, _ATTRIBUTE, _DOMAIN = 1, 2, 4, 5, 7  # of NodeProto,
_NAME, _FLOAT, _INT = 1, 2, 3  # of AttributeProto,
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2  # and of OperatorSetIdProto
_CONTRIBUTED = b"com.microsoft"


def weights_first(model: bytes) -> bytes:
    """Return an ONNX file's bytes with the nodes that read only weights before all other nodes.

    ONNX Runtime orders nodes depth first. Of a node's inputs it first computes the input whose node
    stands last in the file. So the cast of a weight that stands late in the file is computed long
    before it is needed, and memory holds the casts of a whole model at once. A cast that stands
    first in the file is computed just before its consumer, and memory holds one cast at a time.

    Raises:
        EngineError: not an ONNX file.
    """
    return _edited(model, _weights_first)


def flash_attention(model: bytes) -> bytes:
    """Return an ONNX file's bytes with Attention replaced by ONNX Runtime's MultiHeadAttention.

    Both operators compute the same. On the CPU ONNX Runtime holds all scores of Attention in
    memory, 0.5 GiB at 512 px, and takes 2.97 s of a UNet call. It computes MultiHeadAttention block
    by block, in 0.82 s (docs/memory.md). Causal or masked Attention and grouped heads stay.

    Raises:
        EngineError: not an ONNX file.
    """
    changed = _edited(model, _flash_attention)
    imported = [domain for each in values(model, _OPSET) for domain in values(each, _OPSET_DOMAIN)]
    if changed == model or _CONTRIBUTED in imported:
        return changed
    opset = encoded(_OPSET_DOMAIN, _CONTRIBUTED) + encoded(_OPSET_VERSION, 1)
    return changed + encoded(_OPSET, opset)


def _edited(model: bytes, edit: Callable[[list[Field]], list[bytes]]) -> bytes:
    """Return a model with its graph's fields edited."""
    try:
        return b"".join(
            encoded(_GRAPH, b"".join(edit(list(fields(field.value)))))
            if field.number == _GRAPH
            else field.whole
            for field in fields(model)
        )
    except (IndexError, ValueError) as error:
        raise EngineError("not a whole ONNX file", got=error) from error


def _weights_first(graph: list[Field]) -> list[bytes]:
    weights = {
        name
        for field in graph
        if field.number == _INITIALIZER
        for name in values(field.value, _TENSOR_NAME)
    }

    def later(node: Field) -> bool:
        inputs = values(node.value, _INPUT)
        return not inputs or not weights.issuperset(inputs)

    nodes = sorted((field for field in graph if field.number == _NODE), key=later)
    return [field.whole for field in (*nodes, *(f for f in graph if f.number != _NODE))]


def _flash_attention(graph: list[Field]) -> list[bytes]:
    return [
        encoded(_NODE, _multi_head(field.value))
        if field.number == _NODE and _is_plain_attention(field.value)
        else field.whole
        for field in graph
    ]


def _is_plain_attention(node: bytes) -> bool:
    """Whether a node is Attention of three packed inputs that MultiHeadAttention can compute."""
    if values(node, _OP_TYPE) != [b"Attention"] or values(node, _DOMAIN) not in ([], [b""]):
        return False
    numbers = {
        values(attribute, _NAME)[0]: b"".join(values(attribute, _FLOAT) + values(attribute, _INT))
        for attribute in values(node, _ATTRIBUTE)
    }
    heads = numbers.pop(b"q_num_heads", b"")  # as they are encoded
    same = heads == numbers.pop(b"kv_num_heads", b"")
    numbers.pop(b"scale", None)
    return (
        bool(heads)
        and same
        and not any(map(any, numbers.values()))  # is_causal, softcap and the like: off
        and len([name for name in values(node, _INPUT) if name]) == 3
        and len([name for name in values(node, _OUTPUT) if name]) == 1
    )


def _multi_head(node: bytes) -> bytes:
    kept = []
    for field in fields(node):
        if field.number == _ATTRIBUTE:
            (name,) = values(field.value, _NAME)
            if name == b"q_num_heads":
                kept.append(encoded(_ATTRIBUTE, _renamed(field.value, b"num_heads")))
            elif name == b"scale":
                kept.append(field.whole)
        elif field.number not in (_OP_TYPE, _DOMAIN):
            kept.append(field.whole)
    return b"".join(
        [*kept, encoded(_OP_TYPE, b"MultiHeadAttention"), encoded(_DOMAIN, _CONTRIBUTED)]
    )


def _renamed(attribute: bytes, name: bytes) -> bytes:
    rest = b"".join(field.whole for field in fields(attribute) if field.number != _NAME)
    return encoded(_NAME, name) + rest
