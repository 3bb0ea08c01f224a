"""Build a bundle's TensorRT-RTX plans, each in a process of its own, and print a Markdown table.

    python -m sld_edge.benchmarks.plans BUNDLE --compute-capability 8.6 8.9 12.0 --size 256 512 768

A full-size bundle with random weights: `python -m sld_edge.benchmarks.sd15 --output sd15`, then
`sld-export --model sd15 --output BUNDLE`. The plans stay in the bundle. Other options go to
`sld-build` as they are. Peak memory is the process's largest resident set, mapped weights included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sld_edge.engines.plan_info import PlanInfo, info_path, plan_info_from_file
from sld_edge.runtime.bundle import Bundle
from sld_edge.runtime.plans import plan_name

# The child prints its own peak last: what the parent could see is the largest of all children.
_CHILD = """
import json, sys
from sld_edge.export.build_cli import main
from sld_edge.runtime.console import peak_memory
code = main(sys.argv[1:])
print(json.dumps(peak_memory()))
sys.exit(code)
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One component: its plan, the seconds of the whole process, its peak memory in bytes."""

    info: PlanInfo
    wall_seconds: float
    peak: int | None


def measure(bundle: Path, component: str, options: Sequence[str]) -> Row:
    """Build one component's plan in a fresh process.

    Raises:
        CalledProcessError: the build failed; its reason is on stderr.
    """
    arguments = [str(bundle), "--engine", "tensorrt-rtx", "--components", component]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *arguments, "--force", "--quiet", *options],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Row(
        info=plan_info_from_file(info_path(bundle / plan_name(component))),
        wall_seconds=time.perf_counter() - start,
        peak=json.loads(done.stdout.splitlines()[-1]),
    )


def table(rows: Sequence[Row]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| component | precision | form | build s | process s | peak GiB | plan MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        info = row.info
        peak = f"{row.peak / 2**30:.2f}" if row.peak is not None else "unknown"
        lines.append(
            f"| {info.component} | {info.precision} | {info.options['form']} | {info.seconds:.1f} "
            f"| {row.wall_seconds:.1f} | {peak} | {info.bytes / 1e6:.1f} |"
        )
    lines.append(
        f"| all | | | {sum(row.info.seconds for row in rows):.1f} "
        f"| {sum(row.wall_seconds for row in rows):.1f} | | "
        f"{sum(row.info.bytes for row in rows) / 1e6:.1f} |"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every component of a bundle and print the table."""
    cli = argparse.ArgumentParser(
        description="Measure building the plans of a bundle.", allow_abbrev=False
    )
    cli.add_argument("bundle", type=Path)
    given, options = cli.parse_known_args(arguments)
    rows = []
    for component in Bundle.open(given.bundle).manifest.components:
        rows.append(measure(given.bundle, component, options))
        print(f"{component}: done", file=sys.stderr)
    first = rows[0].info
    print(f"{first.engine} {first.engine_version}, {', '.join(first.compute_capabilities)}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
