"""Decode large latents on the CPU as a whole and in tiles: memory, time, how far apart they are.

    python -m sld_edge.benchmarks.decode_tiles sd15 --sizes 512 1024 1536

Every decode is a process of its own, watched from outside. A bundle that was never run here is
prepared first, uncounted. Sizes above `--whole-up-to` are decoded in tiles only.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from sld_edge.benchmarks.bench.child import MARK, run_child
from sld_edge.benchmarks.bench.memory import Phase, PhaseMeter, sampled
from sld_edge.benchmarks.miniworld.experiment import psnr
from sld_edge.engines.settings import thread_count
from sld_edge.runtime.console import run_command
from sld_edge.runtime.pipeline import Pipeline
from sld_edge.runtime.tiles import VaeTiling

_WORK = "--work"  # what a process of this module is started with
_HEAD = "| pixels | how | peak GiB | of it anonymous | s | largest difference | mean | PSNR dB |"


def table(bundle: Path, sizes: Sequence[int], *, whole_up_to: int) -> str:
    """Return the Markdown table: a row for each size and way."""
    lines = [_HEAD, f"|{'---|' * 8}"]
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            pictures = {}
            ways: tuple[VaeTiling, ...] = ("off", "on") if size <= whole_up_to else ("on",)
            for tiling in ways:
                keep = Path(folder, f"{size}-{tiling}.npy")
                figures = _decoded(bundle, size, tiling, keep)
                pictures[tiling] = np.load(keep)
                apart = ["", "", ""]
                if len(pictures) == 2:
                    error = np.abs(pictures["on"].astype(int) - pictures["off"])
                    decibels = psnr(pictures["on"], pictures["off"])
                    apart = [f"{error.max()}", f"{error.mean():.2f}", f"{decibels:.1f}"]
                name = {"off": "whole", "on": "tiles"}[tiling]
                lines.append(f"| {' | '.join([str(size), name, *figures, *apart])} |")
    return "\n".join(lines)


def _decoded(bundle: Path, size: int, tiling: VaeTiling, keep: Path) -> list[str]:
    """Decode in a process of its own; return peak and anonymous memory, GiB, and seconds."""
    task = {"bundle": str(bundle), "size": size, "tiling": tiling, "keep": str(keep)}
    command = [sys.executable, "-m", "sld_edge.benchmarks.decode_tiles"]
    outcome = run_child([*command, _WORK], task, name=f"decoding {size} pixels")
    decode = sampled(Phase(**outcome.told["phase"]), outcome.readings)
    memory = [f"{(bytes_ or 0) / 2**30:.2f}" for bytes_ in (decode.peak, decode.anonymous)]
    return [*memory, f"{decode.end - decode.begin:.1f}"]


def _work(task: Mapping[str, Any]) -> None:
    """Decode one picture's latents and nothing else; answer, and wait until that has been read."""
    with Pipeline.load(task["bundle"], provider="cpu", vae_tiling=task["tiling"]) as pipeline:
        cells = task["size"] // pipeline.bundle.manifest.latents.downscale
        latents = np.random.default_rng(0).standard_normal((1, 4, cells, cells), np.float32)
        meter = PhaseMeter()
        pictures = pipeline.decode(latents)
        meter.end("decode")
    np.save(task["keep"], pictures)
    print(f"{MARK}{json.dumps({'phase': asdict(meter.phases[0])})}", flush=True)
    sys.stdin.read()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == [_WORK]:
        return run_command(lambda: _work(json.loads(given[1])))
    return run_command(lambda: _run(given))


def _run(arguments: Sequence[str]) -> None:
    cli = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    cli.add_argument("bundle", type=Path)
    cli.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 1536], help="pixels")
    cli.add_argument("--whole-up-to", type=int, default=1024, help="largest decoded as a whole")
    asked = cli.parse_args(arguments)
    with Pipeline.load(asked.bundle, provider="cpu") as pipeline:
        pipeline.warm_up()
    print(table(asked.bundle, asked.sizes, whole_up_to=asked.whole_up_to))
    threads = thread_count() or "all"
    print(f"\n{asked.bundle.name}, {threads} threads, {date.today()}")


if __name__ == "__main__":
    sys.exit(main())
