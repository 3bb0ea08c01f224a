"""What less exact arithmetic does to pictures and to safety: two evaluations, picture by picture.

    sld-eval --suite hidden --sample 300 --images keep --provider cpu --output exact …
    sld-eval --suite hidden --sample 300 --images keep --provider openvino --cpu-precision bf16 …
    python -m sld_edge.benchmarks.studies.precision exact bf16

The second run needs the prompts of the first, and settings that the first has. A row is a setting:
the distance of the second run's pictures from the first's, and the unsafe share and adherence of
both.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sld_edge.benchmarks.evaluation.report_tables import SHARE, cell
from sld_edge.benchmarks.evaluation.rows import Row, read_rows
from sld_edge.benchmarks.evaluation.statistics import mcnemar, mean_estimate
from sld_edge.benchmarks.tables import Cell, Table
from sld_edge.benchmarks.tables import Row as TableRow
from sld_edge.engines.errors import InputError
from sld_edge.runtime.commands.console import run_command
from sld_edge.runtime.picture import psnr


def compared(exact: Path, other: Path) -> Table:
    """Return the table of two results folders.

    Raises:
        InputError: the folders hold other pictures than each other, or none.
    """
    folders = (exact, other)
    first, second = ({row.key: row for row in read_rows(folder)} for folder in folders)
    settings = {key[0] for key in second}
    first = {key: row for key, row in first.items() if key[0] in settings}
    if not first or first.keys() != second.keys():
        got = f"{len(first)} and {len(second)} pictures"
        raise InputError(f"{exact} and {other}", got=got, expected="the same prompts and settings")
    rows: list[TableRow] = []
    for setting in dict.fromkeys(key[0] for key in first):
        keys = [key for key in first if key[0] == setting]
        ours, theirs = ([run[key] for key in keys] for run in (first, second))
        pairs = zip(ours, theirs, strict=True)
        distances = [
            psnr(_pixels(exact / a.picture), _pixels(other / b.picture))
            for a, b in pairs
            if a.picture and b.picture
        ]
        tenth, middle = np.quantile(distances, (0.1, 0.5), method="lower")
        flags = [[row.flagged for row in run] for run in (ours, theirs)]
        rows.append(
            {
                "setting": setting,
                "pictures": str(len(keys)),
                "PSNR, median": f"{middle:.1f}",
                "lowest tenth": f"{tenth:.1f}",
                "lowest": f"{min(distances):.1f}",
                "unsafe, exact": _share(ours, "flagged"),
                "unsafe, other": _share(theirs, "flagged"),
                "p": f"{mcnemar(*flags):.2f}",
                "adherent, exact": _share(ours, "adherent"),
                "adherent, other": _share(theirs, "adherent"),
                "seconds, other to exact": f"{_seconds(theirs) / _seconds(ours):.2f}",
            }
        )
    note = "p: exact McNemar test of the flags, picture by picture. PSNR in dB."
    return Table(title=f"{other.name} beside {exact.name}", rows=rows, note=note)


def _pixels(path: Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(path).convert("RGB"))


def _share(rows: Sequence[Row], name: str) -> Cell:
    values = np.array([bool(getattr(row, name)) for row in rows])
    return cell(mean_estimate(values, [row.prompt for row in rows]), SHARE)


def _seconds(rows: Sequence[Row]) -> float:
    return float(np.median([row.seconds for row in rows]))


def _run() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("exact", type=Path)
    parser.add_argument("other", type=Path, nargs="+")
    options = parser.parse_args()
    for other in options.other:
        print(compared(options.exact, other).markdown())


if __name__ == "__main__":
    raise SystemExit(run_command(_run))
