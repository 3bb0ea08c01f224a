"""The records that describe a model family; a new family is a module with one `Family`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sld_edge.engines.errors import CheckpointError
from sld_edge.export.checkpoints.checkpoint import PREVIEW_VAE, Checkpoint
from sld_edge.runtime.manifest import Condition, GuidanceKind

if TYPE_CHECKING:
    from sld_edge.export.graphs.builder import GraphOptions

# Writes a graph to a path; the first argument is a Model, None for a graph without weights.
Write = Callable[[Any, "GraphOptions", Path], None]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One graph of a family.

    Attributes:
        name: the component.
        folder: the model that the graph is made from; None for a graph without weights.
        write: writes the graph, and its weights as `PATH.data`.
        weights_of: another component, where the graph reads its weights file; the graph is then
            made from that component's graph, which `write` reads from the same folder.
        precision: the default arithmetic; None: the export's.
    """

    name: str
    folder: str | None
    write: Write
    weights_of: str | None = None
    precision: Literal["fp32"] | None = None


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The denoiser's inputs beside latents and timestep, and how its guidance works."""

    conditioning: Mapping[str, Condition]
    guidance: GuidanceKind = "classifier-free"


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of model.

    Attributes:
        name: for messages.
        folders: the models of a checkpoint.
        parts: the graphs, in the bundle's order; a part follows the part whose weights it reads.
        inputs: reads the denoiser's inputs from a checkpoint's configs; raises CheckpointError for
            models that do not fit together.
    """

    name: str
    folders: tuple[str, ...]
    parts: tuple[Part, ...]
    inputs: Callable[[Checkpoint], Inputs]

    def matches(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint has exactly this family's models."""
        return set(checkpoint.models) - {PREVIEW_VAE} == set(self.folders)

    def parts_of(self, checkpoint: Checkpoint) -> list[Part]:
        """Return the parts whose models a checkpoint has."""
        return [
            part for part in self.parts if part.folder is None or part.folder in checkpoint.models
        ]


def require_equal(what: str, sides: Mapping[str, int]) -> int:
    """Return the size that several models agree on.

    Raises:
        CheckpointError: the models have different sizes.
    """
    if len(set(sides.values())) > 1:
        raise CheckpointError(
            f"the checkpoint's parts do not fit together: {what}",
            got=", ".join(f"{part} {value}" for part, value in sides.items()),
            expected="the same",
            do="use the parts of one model",
        )
    return next(iter(sides.values()))
