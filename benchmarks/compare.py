"""Measure sld-edge against diffusers' safe pipeline: both in one run, each in its own process.

    python -m sld_edge.benchmarks.compare --checkpoint DIR --bundle DIR --size 256 --rounds 5

Rounds are interleaved; figures are medians, ratios are taken round by round (ours / diffusers) and
given as median, lowest and highest. One round before the first is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

FIGURES = {
    "ready_s": "process start to ready, s",
    "image_s": "process start to image, s",
    "step_s": "a step, s",
    "ready_gib": "memory at ready, GiB",
    "peak_gib": "peak memory, GiB",
    "anonymous_gib": "of it anonymous at the end, GiB",
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
    """Run one process with a task for `worker.py` and return the figures it prints."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "SLD_EDGE_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "SLD_BENCH_STARTED": repr(time.time()),
    }
    command = [sys.executable, "-m", "sld_edge.benchmarks.worker", json.dumps(task)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{task['who']} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(rounds: list[dict[str, dict[str, Any]]]) -> str:
    """Return the Markdown table of all figures."""
    lines = ["| | ours | diffusers | ratio (lowest to highest) |", "|---|---|---|---|"]
    for key, name in FIGURES.items():
        sides = {who: [one[who][key] for one in rounds] for who in ("ours", "diffusers")}
        ratios = [a / b for a, b in zip(sides["ours"], sides["diffusers"], strict=True)]
        ours, theirs = (statistics.median(sides[who]) for who in ("ours", "diffusers"))
        lines.append(
            f"| {name} | {ours:.2f} | {theirs:.2f} | **{statistics.median(ratios):.2f}** "
            f"({min(ratios):.2f} to {max(ratios):.2f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the comparison and print it; keep the raw figures where asked."""
    cli = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    cli.add_argument("--checkpoint", type=Path, required=True, help="diffusers directory")
    cli.add_argument("--bundle", type=Path, help="our bundle of it (default: the miniature's)")
    cli.add_argument("--size", type=int, default=256, help="pixels")
    cli.add_argument("--steps", type=int, default=5)
    cli.add_argument("--rounds", type=int, default=5)
    cli.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    cli.add_argument("--raw", type=Path, help="write every figure of every round as JSON")
    asked = cli.parse_args()
    settings = {"size": asked.size, "steps": asked.steps, "threads": asked.threads}
    rounds = []
    for number in range(asked.rounds + 1):
        one = {
            "ours": measure("ours", asked.bundle, **settings),
            "diffusers": measure("diffusers", asked.checkpoint, **settings),
        }
        print(f"round {number} of {asked.rounds}", file=sys.stderr)
        if number:
            rounds.append(one)
    conditions = (
        f"{asked.size} px, three branches, {asked.steps} steps, {asked.threads} threads, "
        f"{asked.rounds} rounds, Python {platform.python_version()}, {date.today()}"
    )
    print(table(rounds))
    print(f"\n{conditions}")
    if asked.raw:
        asked.raw.write_text(json.dumps({"conditions": conditions, "rounds": rounds}, indent=1))


if __name__ == "__main__":
    main()
