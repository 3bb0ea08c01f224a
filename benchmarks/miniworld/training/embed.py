"""Export the trained miniature into the package, where `sld-run` finds it when none is named.

python -m sld_edge.benchmarks.miniworld.training.embed

It is exported twice: in FP32, which `sld-run` uses; and in FP16 with the Attention operator, as
`sld-export` writes a bundle by default, for the self-test. Both have the same files of weights, so
of the second only the other files are kept.

An export copies the package's guidance graphs, which lie here too. To change one of them, write it
to `EMBEDDED` with `export.guidance`, put its hash into `OWN_GRAPHS`, `embed` into a new folder and
move that here.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Literal

from sld_edge.benchmarks.miniworld.captions import SCENERY, article
from sld_edge.benchmarks.miniworld.prompts import CONCEPT
from sld_edge.benchmarks.miniworld.split import fitting_captions
from sld_edge.benchmarks.miniworld.world import COLOURS, SHAPES, SIZES
from sld_edge.engines.files import sha256_of_file, write_whole
from sld_edge.export import ExportSettings, export_bundle
from sld_edge.runtime.bundle import EMBEDDED, EMBEDDED_FP16

CHECKPOINT = Path(__file__).parents[1] / "checkpoint"


def embed(output: Path = EMBEDDED) -> Path:
    """Write the bundle: FP16 weights, as the checkpoint has them, and FP32 arithmetic."""
    return exported(CHECKPOINT, output, name="miniature")


def embed_fp16(output: Path = EMBEDDED_FP16, *, beside: Path = EMBEDDED) -> Path:
    """Write the files of the FP16 bundle that differ from those of the FP32 bundle `beside`."""
    output.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for file in exported(
            CHECKPOINT, Path(folder) / "bundle", name="miniature", precision="fp16"
        ).iterdir():
            twin = beside / file.name
            if not twin.exists() or sha256_of_file(twin)[0] != sha256_of_file(file)[0]:
                write_whole(output / file.name, file.read_bytes())
    return output


def filter_texts() -> tuple[str, ...]:
    """Return the texts that the text filter preserves: captions for fitting, scenes and things."""
    things = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    sized = [f"a {SIZES[k % 2]} {thing}" for k, thing in enumerate(things)]
    named = [f"{article(thing)} {thing}" for thing in things]
    return (*fitting_captions()[::3], *SCENERY.values(), *named, *sized)


def exported(
    model: Path, output: Path, *, name: str, precision: Literal["fp32", "fp16"] = "fp32"
) -> Path:
    """Export a checkpoint of the miniature world, with its concept and text filter."""
    return export_bundle(
        ExportSettings(
            model=str(model),
            name=name,
            output=output,
            precision=precision,
            storage="fp16",
            safety_concept=CONCEPT,
            text_filter=CONCEPT,
            filter_preserve=filter_texts(),
            force=True,
        )
    )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(embed())
    print(embed_fp16())
