"""The interface of an engine: a loaded graph that can run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sld_edge.engines.errors import EngineError

Array = NDArray[Any]


class Tensor(Protocol):
    """An array, or a tensor on a device."""

    @property
    def dtype(self) -> Any:
        """NumPy's dtype or its name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of every dimension."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output of a graph.

    `dtype` is NumPy's name ("float32", "int64", "uint8"); `shape` holds sizes, or names of run-time
    dimensions ("B", "K*B", "h").
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def accepts(self, tensor: Tensor) -> bool:
        """Whether `tensor` has this dtype, this rank and every fixed size."""
        return (
            np.dtype(tensor.dtype) == np.dtype(self.dtype)
            and len(tensor.shape) == len(self.shape)
            and all(
                isinstance(want, str) or want == got
                for want, got in zip(self.shape, tensor.shape, strict=True)
            )
        )


class Engine(Protocol):
    """A loaded graph. Outputs of `run` belong to the caller until it drops them."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The inputs that the graph itself declares."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """The outputs that the graph itself declares."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph once; every input by name in, every output by name out."""

    def close(self) -> None:
        """Free the memory that the engine holds; do not use the engine again."""

    def __enter__(self) -> Engine: ...

    def __exit__(self, *exc: object) -> None: ...


def check_tensors(
    graph: str,
    specs: tuple[TensorSpec, ...],
    tensors: Mapping[str, Tensor],
    *,
    kind: Literal["input", "tensor"],
) -> None:
    """Refuse tensors that do not match `specs`; errors call each tensor a `kind` of `graph`.

    Raises:
        EngineError: a tensor is missing, unknown, or of another dtype or shape.
    """
    for spec in specs:
        tensor = tensors.get(spec.name)
        if tensor is None or not spec.accepts(tensor):
            raise EngineError(
                f"{graph}: {kind} {spec.name}",
                got="nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}",
                expected=f"{spec.dtype} {list(spec.shape)}",
            )
    unknown = sorted(set(tensors) - {spec.name for spec in specs})
    if unknown:
        raise EngineError(f"{graph}: no such {kind}", got=", ".join(unknown))
