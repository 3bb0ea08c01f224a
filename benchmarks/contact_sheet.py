"""The README's picture: rows from plain to max, one column a seed.

    python -m sld_edge.benchmarks.contact_sheet --answers DIR/answers.jsonl --output sheet.png

DIR is the safety table's. The columns are its first biased prompts whose plain picture has a skull,
in order and whatever the other rows show, then the first ones that have none.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sld_edge.benchmarks.safety_table import (
    FIRST_SEED,
    SETTINGS,
    Answer,
    answers_from_log,
    prompts,
)
from sld_edge.runtime import Pipeline

ZOOM, GAP, LEFT, TOP = 112, 6, 150, 44
INK, PAPER, FAINT = "#1d1d2b", "#ffffff", "#6b6b7b"


def columns(answers: list[Answer], *, unsafe: int, safe: int) -> list[int]:
    """Return the prompts to show: the first so many whose plain picture is unsafe, then safe."""
    plain = sorted(
        (answer for answer in answers if answer.biased and answer.setting == "plain"),
        key=lambda answer: answer.index,
    )
    with_skull = [answer.index for answer in plain if answer.skull > 0.5]
    without = [answer.index for answer in plain if answer.skull <= 0.5]
    return with_skull[:unsafe] + without[:safe]


def sheet(chosen: list[int], *, biased: int, steps: int) -> Image.Image:
    """Make the pictures again, with the table's seeds, and lay them out."""
    pipeline = Pipeline.load()
    asked = prompts(biased, 0)
    size = (LEFT + len(chosen) * (ZOOM + GAP), TOP + len(SETTINGS) * (ZOOM + GAP) + GAP)
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    bold, small = ImageFont.load_default(17), ImageFont.load_default(11)
    for row, (name, options) in enumerate(SETTINGS.items()):
        y = TOP + row * (ZOOM + GAP)
        draw.text((12, y + ZOOM / 2 - 10), name, INK, font=bold)
        for column, index in enumerate(chosen):
            x, prompt = LEFT + column * (ZOOM + GAP), asked[index]
            if not row:
                subject, _, place = prompt.text.partition(f" {prompt.shape} ")
                draw.text((x, 8), f"{subject} {prompt.shape}", FAINT, font=small)
                draw.text((x, 22), place, FAINT, font=small)
            made = pipeline(prompt.text, seed=FIRST_SEED + index, steps=steps, **options).images[0]
            canvas.paste(made.resize((ZOOM, ZOOM), Image.Resampling.LANCZOS), (x, y))
    return canvas


def main() -> None:
    """Draw and write the sheet."""
    cli = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    cli.add_argument("--answers", type=Path, required=True)
    cli.add_argument("--output", type=Path, required=True)
    cli.add_argument("--steps", type=int, default=50)
    asked = cli.parse_args()
    answers = answers_from_log(asked.answers)
    biased = len({answer.index for answer in answers if answer.biased})
    chosen = columns(answers, unsafe=7, safe=2)
    sheet(chosen, biased=biased, steps=asked.steps).save(asked.output, optimize=True)


if __name__ == "__main__":
    main()
