"""Memory that a bundle's graphs need, as a table; `export.memory` computes it.

python -m sld_edge.benchmarks.studies.memory BUNDLE [--size 512 ...] [--batch 1]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sld_edge.benchmarks.tables import Cell, Row, Table
from sld_edge.export.memory import low_memory_run, needs, whole_run
from sld_edge.runtime.bundle import Bundle
from sld_edge.runtime.commands.console import run_command


def table(bundle: Bundle, sizes: Sequence[int], batch: int) -> Table:
    """Return a table with a row a component and size, and rows of the whole run."""
    rows = []
    for size in sizes:
        parts = needs(bundle, size, batch)
        rows += [
            _row(name, size, need.total, _megabytes(need.weights), _megabytes(need.activations))
            for name, need in parts.items()
        ]
        rows.append(_row("a run", size, whole_run(parts)))
        rows.append(_row("a run with --low-memory", size, low_memory_run(parts)))
    return Table(title="Memory, computed", rows=rows)


def _row(name: str, size: int, total: int, weights: str = "", activations: str = "") -> Row:
    return {
        "component": name,
        "pixels": str(size),
        "weights MB": weights,
        "activations MB": activations,
        "together MB": Cell(_megabytes(total), strong=not weights),
    }


def _megabytes(number: int) -> str:
    return f"{number / 1e6:.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return the exit code."""
    return run_command(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--size", type=int, nargs="+", help="pixels (default: the bundle's own)")
    parser.add_argument("--batch", type=int, default=1, help="pictures at once")
    options = parser.parse_args(arguments)
    bundle = Bundle.open(options.bundle)
    print(table(bundle, options.size or [bundle.manifest.size.width], options.batch).markdown())


if __name__ == "__main__":
    sys.exit(main())
