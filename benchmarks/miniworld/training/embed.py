"""Export the trained miniature into the package, where `sld-run` finds it when none is named.

python -m sld_edge.benchmarks.miniworld.training.embed

An export copies the package's guidance graphs, which lie here too. To change one of them, write it
to `EMBEDDED` with `export.guidance`, put its hash into `OWN_GRAPHS`, `embed` into a new folder and
move that here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sld_edge.benchmarks.miniworld.prompts import CONCEPT
from sld_edge.export import ExportSettings, export_bundle
from sld_edge.runtime.bundle import EMBEDDED

CHECKPOINT = Path(__file__).parents[1] / "checkpoint"


def embed(output: Path = EMBEDDED) -> Path:
    """Write the bundle: FP16 weights, as the checkpoint has them, and FP32 arithmetic."""
    return export_bundle(
        ExportSettings(
            model=str(CHECKPOINT),
            name="miniature",
            output=output,
            precision="fp32",
            storage="fp16",
            safety_concept=CONCEPT,
            force=True,
        )
    )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(embed())
