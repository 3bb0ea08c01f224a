"""Where a run's time goes, by component, from loading to the picture; the rest is Python's.

    python -m sld_edge.benchmarks.studies.profile sd15 --steps 4 25 --size 512 [--provider openvino]

The second run of a process is measured, with another prompt, so that the text is encoded again.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from sld_edge.benchmarks.tables import Row, Table
from sld_edge.runtime import Pipeline
from sld_edge.runtime.commands.console import run_command
from sld_edge.runtime.loader import Loader
from sld_edge.runtime.picture import png_from_image


@contextmanager
def watched(seconds: dict[str, float]) -> Iterator[None]:
    """Add the seconds of every load and run of a component in the block to `seconds`."""
    load = Loader.load

    def timed(loader: Loader, name: str, *rest: Any) -> Any:
        begin = time.perf_counter()
        engine: Any = load(loader, name, *rest)
        seconds[f"loading {name}"] += time.perf_counter() - begin
        run = engine.run

        def timed_run(feeds: Any) -> Any:
            begin = time.perf_counter()
            outputs = run(feeds)
            seconds[name] += time.perf_counter() - begin
            return outputs

        engine.run = timed_run  # the engine keeps its class, by which the runtime treats it
        return engine

    with patch.object(Loader, "load", timed):
        yield


def shares(
    pipeline: Pipeline, seconds: dict[str, float], *, steps: int, size: int, safety: str
) -> list[Row]:
    """Return a row for each component of one run, in seconds and as a share of the whole."""
    prompts = (f"a harbour, {number} of {steps}" for number in (1, 2))
    for prompt in prompts:
        seconds.clear()
        begin = time.perf_counter()
        result = pipeline(prompt, safety=safety, steps=steps, width=size, height=size, seed=7)
        made = time.perf_counter()
        png_from_image(result.images[0], result.reports[0])
        done = time.perf_counter()
    parts = {**seconds, "PNG": done - made}
    parts["everything else"] = done - begin - sum(parts.values())
    return [
        {
            "part": name,
            "seconds": f"{spent:.4f}",
            "share": f"{spent / (done - begin):.2%}",
        }
        for name, spent in sorted(parts.items(), key=lambda item: -item[1])
    ]


def _run() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, nargs="?")
    parser.add_argument("--provider", default="cpu")
    parser.add_argument("--cpu-precision", default="fp32")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 25])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--safety", default="guard")
    parser.add_argument("--vae", default="full", choices=("full", "tiny"))
    options = parser.parse_args()
    seconds: dict[str, float] = defaultdict(float)
    with (
        watched(seconds),
        Pipeline.load(
            options.bundle,
            provider=options.provider,
            cpu_precision=options.cpu_precision,
            vae=options.vae,
            evaluation=True,
        ) as pipeline,
    ):
        pipeline.warm_up(width=options.size, height=options.size)
        for steps in options.steps:
            rows = shares(pipeline, seconds, steps=steps, size=options.size, safety=options.safety)
            title = f"{steps} steps, {options.size} px, {options.safety}, {options.provider}"
            print(Table(title=f"{title} {options.cpu_precision}", rows=rows).markdown())


if __name__ == "__main__":
    raise SystemExit(run_command(_run))
