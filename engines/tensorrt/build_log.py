"""What TensorRT made of a graph, read from the builder's log: kernels, attentions, memory.

With detailed profiling the builder logs a line for each layer of the plan, and the plan's memory.
There is no other way to learn this without a device.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LAYERS, _MEMORY = "Layers:\n", re.compile(r"Total Activation Memory: (\d+) bytes")
_LINE = re.compile(r"Name: (?P<name>.+?), LayerType: (?P<kind>\w+), Inputs: (?P<rest>.*)")
_NODES = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_TYPES = re.compile(r"Datatype: (\w+)")
_ON_HOST = {"shape_call", "reshape", "cast"}  # arithmetic with shapes, no kernel
_FUSED = "mha"  # multi-head attention, in the names of its kernels
_ATTENTION = ("/Softmax", "/Attention")  # ends of the ONNX nodes that each attention has one of


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer of a plan.

    Attributes:
        name: as TensorRT gives it.
        kind: TensorRT's word, "gemm" or "kgen".
        outputs: the dtypes of its outputs, "Half" or "Float".
        nodes: the ONNX nodes that it computes, as far as TensorRT says.
    """

    name: str
    kind: str
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PlanContents:
    """What is in a plan.

    Attributes:
        kernels: number of kernels in a run.
        fp32_kernels: how many of them write only FP32.
        attentions: number of attentions.
        fused_attentions: how many of them are one kernel, which keeps no matrix of scores.
        activation_bytes: activation memory for the largest shapes.
    """

    kernels: int
    fp32_kernels: int
    attentions: int
    fused_attentions: int
    activation_bytes: int


class BuildLog:
    """The part of a builder's log that says what is in the plan."""

    def __init__(self) -> None:
        """Start empty."""
        self._layers, self._memory = "", 0

    def take(self, message: str) -> None:
        """Take one message of the log."""
        memory = _MEMORY.search(message)
        if memory is not None:
            self._memory = int(memory[1])
        elif message.startswith(_LAYERS):
            self._layers = message

    def layers(self) -> tuple[Layer, ...]:
        """Return the plan's layers in order; empty where the log does not say."""
        lines = self._layers.splitlines()[1:]
        return tuple(_layer(found) for line in lines if (found := _LINE.match(line)) is not None)

    def contents(self) -> PlanContents | None:
        """Return what is in the plan; None where the log does not say."""
        kernels = [layer for layer in self.layers() if layer.kind not in _ON_HOST]
        if not kernels:
            return None
        fused = {node for layer in kernels if _FUSED in layer.name for node in layer.nodes}
        every = {node for layer in kernels for node in layer.nodes}
        return PlanContents(
            kernels=len(kernels),
            fp32_kernels=sum(set(layer.outputs) == {"Float"} for layer in kernels),
            attentions=sum(node.endswith(_ATTENTION) for node in every),
            fused_attentions=sum(node.endswith(_ATTENTION) for node in fused),
            activation_bytes=self._memory,
        )


def _layer(line: re.Match[str]) -> Layer:
    outputs = line["rest"].partition("Outputs: ")[2].partition("TacticName: ")[0]
    return Layer(
        name=line["name"],
        kind=line["kind"],
        outputs=tuple(_TYPES.findall(outputs)),
        nodes=tuple(_NODES.findall(line["rest"])),
    )
