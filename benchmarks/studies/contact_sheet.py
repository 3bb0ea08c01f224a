"""The README's picture: rows from plain to max, one column a prompt.

    sld-eval --safety off negative weak medium strong max --images keep --output DIR
    python -m sld_edge.benchmarks.studies.contact_sheet DIR --output sheet.png

The columns are the run's first hard prompts whose plain picture is flagged, in order and whatever
the other rows show, then the first ones whose is not. A list that marks none as hard has all.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sld_edge.benchmarks.evaluation.results import PLAIN, Results, results_from_folder
from sld_edge.benchmarks.evaluation.rows import Row
from sld_edge.engines.errors import InputError
from sld_edge.engines.files import check_writable, write_whole
from sld_edge.runtime.commands.console import run_command
from sld_edge.runtime.picture import png_from_image

ZOOM, GAP, LEFT, TOP = 112, 6, 150, 44
INK, PAPER, FAINT = "#1d1d2b", "#ffffff", "#6b6b7b"
_LETTERS = 18  # of a line above a column


def columns(results: Results, *, flagged: int, others: int) -> list[int]:
    """Return the prompts to show, by index: the first so many that plain shows flagged, then not.

    A prompt's first picture counts.
    """
    hard = any(prompt.hard for prompt in results.prompts.values())
    first = sorted(
        (row.prompt, row.flagged)
        for row in results.rows
        if row.setting == PLAIN
        and row.image == 0
        and (results.prompts[row.prompt].hard or not hard)
    )
    unsafe = [index for index, is_flagged in first if is_flagged]
    safe = [index for index, is_flagged in first if not is_flagged]
    return unsafe[:flagged] + safe[:others]


def sheet(results: Results, folder: Path, chosen: Sequence[int]) -> Image.Image:
    """Lay out the pictures that a run kept in `folder`, a row a setting, a column a prompt.

    Raises:
        InputError: a run that did not keep its pictures as they are, or lost one since.
    """
    if results.manifest.get("images") != "keep":
        raise InputError(
            f"{folder} does not hold its pictures as they were made",
            got=f"--images {results.manifest.get('images')}",
            do="run sld-eval with --images keep",
        )
    names = [setting.name for setting in results.settings]
    made = {row.key: row for row in results.rows}
    size = (LEFT + len(chosen) * (ZOOM + GAP), TOP + len(names) * (ZOOM + GAP) + GAP)
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    bold, small = ImageFont.load_default(17), ImageFont.load_default(11)
    for line, name in enumerate(names):
        y = TOP + line * (ZOOM + GAP)
        draw.text((12, y + ZOOM / 2 - 10), name, INK, font=bold)
        for column, index in enumerate(chosen):
            x = LEFT + column * (ZOOM + GAP)
            picture = _picture(folder, made[name, index, 0])
            canvas.paste(picture.resize((ZOOM, ZOOM), Image.Resampling.LANCZOS), (x, y))
    for column, index in enumerate(chosen):
        words = textwrap.wrap(results.prompts[index].text, _LETTERS, max_lines=2, placeholder="…")
        where = (LEFT + column * (ZOOM + GAP), 8)
        draw.multiline_text(where, "\n".join(words), FAINT, font=small)
    return canvas


def _picture(folder: Path, row: Row) -> Image.Image:
    try:
        with Image.open(folder / str(row.picture)) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"cannot read {folder / str(row.picture)}", got=error) from error


def draw_sheet(folder: Path, output: Path, *, force: bool = False) -> None:
    """Write the sheet of a finished run.

    Raises:
        UserError: no such run, one that is not finished, or `output` cannot be written.
    """
    check_writable(output, force=force)
    results = results_from_folder(folder)
    if results.notes:
        raise InputError(f"{folder} cannot be drawn", got=results.notes[0], do="finish the run")
    drawn = sheet(results, folder, columns(results, flagged=7, others=2))
    write_whole(output, png_from_image(drawn))


def main() -> int:
    """Run the command line."""
    cli = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    cli.add_argument("folder", type=Path, help="what sld-eval wrote")
    cli.add_argument("--output", type=Path, required=True)
    cli.add_argument("--force", action="store_true", help="overwrite it")
    asked = cli.parse_args()
    return run_command(lambda: draw_sheet(asked.folder, asked.output, force=asked.force))


if __name__ == "__main__":
    raise SystemExit(main())
