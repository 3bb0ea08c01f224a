"""Measure memory on the CPU: bundles against diffusers' safe pipeline, and decoding by size.

    python -m sld_edge.benchmarks.cpu_memory --checkpoint sd15 sd15-bundle sd15-half --size 512
    python -m sld_edge.benchmarks.cpu_memory sd15-half --decode 512 1024 1536

Every run is a process of its own, rounds are interleaved; figures are medians, ratios (ours to
diffusers') are taken round by round and given as median, lowest and highest. A bundle that was
never run here is prepared first, uncounted. Peaks are looked at every 5 ms. A step's processor time
is less disturbed by other work on the machine than its wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from sld_edge.engines.errors import EngineError, one_line
from sld_edge.runtime.console import run_command
from sld_edge.runtime.pipeline import Pipeline

FIGURES = {
    "peak_gib": "peak memory, mapped weights included, GiB",
    "peak_anonymous_gib": "peak of anonymous memory, GiB",
    "loop_gib": "peak in the loop, GiB",
    "loop_anonymous_gib": "of it anonymous, GiB",
    "decode_gib": "peak after the loop (decoding), GiB",
    "decode_anonymous_gib": "of it anonymous, GiB",
    "step_cpu_s": "a step, processor seconds",
    "step_s": "a step, wall seconds",
}


def measure(who: str, model: Path | None, *, size: int, steps: int, threads: int) -> dict[str, Any]:
    """Run one process and return its figures, with the median step as `step_s`."""
    task = {
        "who": who,
        "model": None if model is None else str(model),
        "prompt": "a red star at a party",
        "size": size,
        "steps": steps,
    }
    found = run_worker(task, threads=threads)
    found["step_s"] = statistics.median(found["steps_s"])
    found["step_cpu_s"] = statistics.median(found["steps_cpu_s"])
    return found


def run_worker(task: dict[str, Any], *, threads: int) -> dict[str, Any]:
    """Run one process with a task for `cpu_memory_worker.py` and return the figures it prints."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "SLD_EDGE_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "SLD_BENCH_STARTED": repr(time.time()),
    }
    command = [sys.executable, "-m", "sld_edge.benchmarks.cpu_memory_worker", json.dumps(task)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"{task['who']} failed to run", got=one_line(done.stderr[-300:]))
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(rounds: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
    """Return the Markdown table: a row a figure, a column for diffusers and each bundle."""
    names = list(rounds[0])
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for key, title in FIGURES.items():
        cells = []
        for name in names:
            cell = f"{statistics.median(one[name][key] for one in rounds):.2f}"
            if name != "diffusers" and "diffusers" in names:
                ratios = [one[name][key] / one["diffusers"][key] for one in rounds]
                middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
                cell += f", **{middle:.2f}** ({low:.2f} to {high:.2f})"
            cells.append(cell)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def decode_table(bundle: Path, sizes: Sequence[int], *, whole_up_to: int, threads: int) -> str:
    """Return the Markdown table of decoding in tiles and as a whole, by size."""
    lines = [
        "| pixels | how | peak GiB | of it anonymous | processor s | largest difference | mean | "
        "PSNR dB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            pictures = {}
            for how in ("off", "on") if size <= whole_up_to else ("on",):
                keep = Path(folder, f"{size}-{how}.npy")
                task = {"who": "decoding", "model": str(bundle), "size": size, "tiling": how}
                found = run_worker({**task, "keep": str(keep)}, threads=threads)
                pictures[how] = np.load(keep)
                cells = [f"{found[name]:.2f}" for name in ("resident", "anonymous", "cpu_s")]
                apart = _apart(pictures) if len(pictures) == 2 else ["", "", ""]
                name = {"off": "whole", "on": "tiles"}[how]
                lines.append(f"| {size} | {name} | {' | '.join([*cells, *apart])} |")
    return "\n".join(lines)


def _apart(pictures: Mapping[str, Any]) -> list[str]:
    error = np.abs(pictures["on"].astype(np.float64) - pictures["off"])
    power = float(np.square(error).mean())
    psnr = 10 * np.log10(255**2 / power) if power else float("inf")
    return [f"{error.max():.0f}", f"{error.mean():.2f}", f"{psnr:.1f}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    return run_command(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> None:
    cli = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    cli.add_argument("bundles", type=Path, nargs="+")
    cli.add_argument("--checkpoint", type=Path, help="diffusers directory, to compare with")
    cli.add_argument("--size", type=int, default=512, help="pixels")
    cli.add_argument("--steps", type=int, default=3)
    cli.add_argument("--rounds", type=int, default=3)
    cli.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    cli.add_argument("--decode", type=int, nargs="+", help="only decode, pictures of these sizes")
    cli.add_argument("--whole-up-to", type=int, default=1024, help="largest decoded as a whole")
    cli.add_argument("--raw", type=Path, help="write every figure of every round as JSON")
    asked = cli.parse_args(arguments)
    for bundle in asked.bundles:
        with Pipeline.load(bundle, provider="cpu") as pipeline:
            pipeline.warm_up()
    conditions = f"{asked.threads} threads, Python {platform.python_version()}, {date.today()}"
    if asked.decode:
        for bundle in asked.bundles:
            settings = {"whole_up_to": asked.whole_up_to, "threads": asked.threads}
            print(decode_table(bundle, asked.decode, **settings))
            print(f"\n{bundle.name}, {conditions}")
        return
    settings = {"size": asked.size, "steps": asked.steps, "threads": asked.threads}
    rounds = []
    for number in range(asked.rounds):
        one = {}
        if asked.checkpoint is not None:
            one["diffusers"] = measure("diffusers", asked.checkpoint, **settings)
        one |= {bundle.name: measure("ours", bundle, **settings) for bundle in asked.bundles}
        print(f"round {number + 1} of {asked.rounds}", file=sys.stderr)
        rounds.append(one)
    conditions = (
        f"{asked.size} px, three branches, {asked.steps} steps, {asked.rounds} rounds, {conditions}"
    )
    print(table(rounds))
    print(f"\n{conditions}")
    if asked.raw:
        asked.raw.write_text(json.dumps({"conditions": conditions, "rounds": rounds}, indent=1))


if __name__ == "__main__":
    sys.exit(main())
