"""Model families: the graphs of a kind of model, and the sources of their inputs."""

from __future__ import annotations

from sld_edge.engines.errors import CheckpointError
from sld_edge.export.checkpoints.checkpoint import Checkpoint
from sld_edge.export.families.family import Family
from sld_edge.export.families.sd import SD
from sld_edge.export.families.sdxl import SDXL

FAMILIES = (SD, SDXL)


def family_of(checkpoint: Checkpoint) -> Family:
    """Return the family of a checkpoint.

    Raises:
        CheckpointError: no family has these models.
    """
    for family in FAMILIES:
        if family.matches(checkpoint):
            return family
    raise CheckpointError(
        "the checkpoint's models are of no known family",
        got=", ".join(sorted(checkpoint.models)),
        expected=" or ".join(f"{each.name} ({', '.join(each.folders)})" for each in FAMILIES),
    )
