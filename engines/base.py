"""What an engine is: a loaded graph that can run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from sld_edge.engines.errors import EngineError

Array = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output of a graph.

    `dtype` is NumPy's name ("float32", "int64", "uint8"); `shape` holds sizes, or names of run-time
    dimensions ("B", "K*B", "h").
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def takes(self, dtype: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this dtype and shape fits: rank and every fixed size alike."""
        return (
            np.dtype(dtype) == np.dtype(self.dtype)
            and len(shape) == len(self.shape)
            and all(
                isinstance(want, str) or want == got
                for want, got in zip(self.shape, shape, strict=True)
            )
        )

    def accepts(self, array: Array) -> bool:
        """Whether `array` has this dtype, rank and every fixed size."""
        return self.takes(array.dtype.name, array.shape)


class Engine(Protocol):
    """A loaded graph. Outputs of `run` belong to the caller until it drops them."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What the graph itself says it takes."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What the graph itself says it gives."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the graph once; every input by name in, every output by name out."""

    def close(self) -> None:
        """Give back what the engine holds; it is not used again."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...


def check_feeds(graph: str, inputs: tuple[TensorSpec, ...], feeds: Mapping[str, Array]) -> None:
    """Refuse feeds that are not a graph's inputs.

    Raises:
        EngineError: an input is missing, unknown, or of another dtype or shape.
    """
    for spec in inputs:
        array = feeds.get(spec.name)
        if array is None or not spec.accepts(array):
            raise EngineError(
                f"{graph}: input {spec.name}",
                got="nothing" if array is None else f"{array.dtype} {list(array.shape)}",
                expected=f"{spec.dtype} {list(spec.shape)}",
            )
    if len(feeds) != len(inputs):
        unknown = sorted(set(feeds) - {spec.name for spec in inputs})
        raise EngineError(f"{graph}: no such input", got=", ".join(unknown))
