"""The README's picture: a row for each setting, a column for each prompt.

    sld-eval --suite hidden open concept neutral --sample 60 --safety strong max guard --images keep
    python -m sld_edge.benchmarks.studies.contact_sheet sld-eval-results --output sheet.png

The columns are the run's first prompts of each suite, in order, whatever the other rows show: of
hidden, open and concept those with a flagged plain picture. In a run without suites, they are the
first hard prompts with a flagged plain picture, then the first without.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from sld_edge.benchmarks.evaluation.results import PLAIN, Results, results_from_folder
from sld_edge.engines.errors import InputError
from sld_edge.engines.files import check_writable, write_whole
from sld_edge.runtime.commands.console import run_command
from sld_edge.runtime.picture import png_from_image

ZOOM, GAP, LEFT, TOP = 112, 6, 150, 44
INK, PAPER, FAINT = "#1d1d2b", "#ffffff", "#6b6b7b"
_LETTERS = 18  # of a line above a column
_OF_SUITES = {"hidden": 3, "open": 3, "concept": 1, "neutral": 2}  # columns


def columns(results: Results, *, flagged: int, others: int) -> list[int]:
    """Return the prompts to show, by index: first those with a flagged plain picture, then without.

    Only a prompt's first picture counts.
    """
    if results.suites:
        return _columns_of_suites(results)
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


def _columns_of_suites(results: Results) -> list[int]:
    plain = {row.prompt: row for row in results.rows if row.setting == PLAIN and row.image == 0}
    chosen: list[int] = []
    for suite, count in _OF_SUITES.items():
        found = [
            index
            for index, row in plain.items()
            if results.prompts[index].categories[0] == suite and row.flagged == (suite != "neutral")
        ]
        chosen += found[:count]
    return chosen


def draw_sheet(folder: Path, output: Path, *, force: bool = False) -> None:
    """Write the sheet of a finished run: a row a setting, a column a prompt.

    Raises:
        UserError: no such run, a run that is not finished or did not keep its pictures unchanged,
            or `output` cannot be written.
    """
    check_writable(output, force=force)
    results = results_from_folder(folder)
    if results.missing:
        got = f"{results.missing} pictures are missing"
        raise InputError(f"{folder} cannot be drawn", got=got, do="finish the run")
    if results.manifest.get("images") != "keep":
        raise InputError(
            f"{folder} does not hold its pictures as they were made",
            got=f"--images {results.manifest.get('images')}",
            do="run sld-eval with --images keep",
        )
    chosen = columns(results, flagged=7, others=2)
    made = {row.key: row for row in results.rows}
    size = (
        LEFT + len(chosen) * (ZOOM + GAP),
        TOP + len(results.settings) * (ZOOM + GAP) + GAP,
    )
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    bold, small = ImageFont.load_default(17), ImageFont.load_default(11)
    for column, index in enumerate(chosen):
        words = textwrap.wrap(results.prompts[index].text, _LETTERS, max_lines=2, placeholder="…")
        where = (LEFT + column * (ZOOM + GAP), 8)
        draw.multiline_text(where, "\n".join(words), FAINT, font=small)
    for line, setting in enumerate(results.settings):
        y = TOP + line * (ZOOM + GAP)
        draw.text((12, y + ZOOM / 2 - 10), setting.name, INK, font=bold)
        for column, index in enumerate(chosen):
            picture = _picture(folder / str(made[setting.name, index, 0].picture))
            place = (LEFT + column * (ZOOM + GAP), y)
            canvas.paste(picture.resize((ZOOM, ZOOM), Image.Resampling.LANCZOS), place)
    write_whole(output, png_from_image(canvas))


def _picture(path: Path) -> Image.Image:
    try:
        with Image.open(path) as opened:
            return opened.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"cannot read {path}", got=error) from error


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
