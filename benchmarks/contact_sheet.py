"""The README's picture: rows from plain to max, one column a seed.

    python -m sld_edge.benchmarks.contact_sheet --pictures DIR/pictures --output sheet.png

The columns are the first biased prompts of the safety table in order, not picked by hand.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sld_edge.benchmarks.miniworld.prompts import biased_prompts
from sld_edge.benchmarks.safety_table import PROMPT_SEED, SETTINGS, SHEET_COLUMNS

ZOOM, GAP, LEFT, TOP = 112, 6, 150, 44
INK, PAPER, FAINT = "#1d1d2b", "#ffffff", "#6b6b7b"


def sheet(pictures: Path, columns: int) -> Image.Image:
    """Draw the sheet from the pictures that `safety_table` kept."""
    names = list(SETTINGS)
    prompts = biased_prompts(SHEET_COLUMNS, PROMPT_SEED)[:columns]
    size = (LEFT + columns * (ZOOM + GAP), TOP + len(names) * (ZOOM + GAP) + GAP)
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    bold, small = ImageFont.load_default(17), ImageFont.load_default(11)
    for row, name in enumerate(names):
        y = TOP + row * (ZOOM + GAP)
        draw.text((12, y + ZOOM / 2 - 10), name, INK, font=bold)
        for column, prompt in enumerate(prompts):
            x = LEFT + column * (ZOOM + GAP)
            if not row:
                subject, _, place = prompt.text.partition(f" {prompt.shape} ")
                draw.text((x, 8), f"{subject} {prompt.shape}", FAINT, font=small)
                draw.text((x, 22), place, FAINT, font=small)
            file = pictures / f"{column:03d}-{name.replace(' ', '-')}.png"
            with Image.open(file) as picture:
                large = picture.resize((ZOOM, ZOOM), Image.Resampling.LANCZOS)
            canvas.paste(large, (x, y))
    return canvas


def main() -> None:
    """Draw and write the sheet."""
    cli = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    cli.add_argument("--pictures", type=Path, required=True)
    cli.add_argument("--output", type=Path, required=True)
    cli.add_argument("--columns", type=int, default=9)
    asked = cli.parse_args()
    sheet(asked.pictures, asked.columns).save(asked.output, optimize=True)


if __name__ == "__main__":
    main()
