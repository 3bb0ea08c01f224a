"""What an engine is: a loaded graph that can run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

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

    def accepts(self, array: Array) -> bool:
        """Whether `array` has this dtype, rank and every fixed size."""
        return (
            array.dtype == np.dtype(self.dtype)
            and array.ndim == len(self.shape)
            and all(
                isinstance(want, str) or want == got
                for want, got in zip(self.shape, array.shape, strict=True)
            )
        )


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

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...
