"""Show where a run's processor time goes, part by part: what is not the UNet?

    python -m sld_edge.benchmarks.profile_run --bundle sd15-half --size 512 --steps 2

Few steps are measured, after a run to warm up; the shares are those of a run of `--of-steps`. Text,
loading and decoding count once; the rest (noise, samplers, tokenizer, reports and all else that is
no graph) as if all of it were in the loop, which is the most it can be.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

from sld_edge.engines.base import Array, Engine
from sld_edge.engines.errors import InputError
from sld_edge.runtime.bundle import Component
from sld_edge.runtime.console import run_command
from sld_edge.runtime.loader import Loader, LoadSettings
from sld_edge.runtime.pipeline import Pipeline

_ONCE = ("loading", "text_encoder", "vae_decoder")


@dataclass(kw_only=True)
class TimedLoader(Loader):
    """A loader whose engines are timed; `seconds` by part, of the processor."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Count what happens inside as a part's."""
        begin = time.process_time()
        yield
        self.seconds[part] = self.seconds.get(part, 0) + time.process_time() - begin

    def load(self, name: str, component: Component) -> Engine:
        """Return a component's engine, its runs and its loading timed."""
        with self.timed("loading"):
            engine = super().load(name, component)
        run = engine.run

        def timed(feeds: Mapping[str, Array]) -> dict[str, Array]:
            with self.timed(name):
                return run(feeds)

        vars(engine)["run"] = timed
        return engine


def profile(bundle: Path | None, *, size: int, steps: int, of_steps: int) -> dict[str, float]:
    """Return processor seconds by part of a run of `of_steps`, from one of `steps`.

    Raises:
        InputError: fewer than one step.
    """
    if min(steps, of_steps) < 1:
        raise InputError("steps", got=min(steps, of_steps), expected="1 or more")
    loader = TimedLoader.open(bundle, LoadSettings(provider="cpu"))
    assert isinstance(loader, TimedLoader)
    settings = {"safety": "strong", "sampler": "ddim", "width": size, "height": size}
    with Pipeline(loader) as pipeline:
        pipeline("a warm-up", steps=1, **settings)  # type: ignore[arg-type]  # mixed values
        loader.seconds.clear()
        begin = time.process_time()
        pipeline("a red star at a party", steps=steps, **settings)  # type: ignore[arg-type]
        whole = time.process_time() - begin
    found = {**loader.seconds, "the rest": max(whole - sum(loader.seconds.values()), 0)}
    return {
        part: seconds if part in _ONCE else seconds * of_steps / steps
        for part, seconds in found.items()
    }


def table(seconds: Mapping[str, float]) -> str:
    """Return the Markdown table, the longest part first."""
    whole = sum(seconds.values())
    lines = ["| part | processor s | share |", "|---|---|---|"]
    for part, own in sorted(seconds.items(), key=lambda item: -item[1]):
        lines.append(f"| {part} | {own:.2f} | {own / whole:.2%} |")
    rest = whole - seconds["unet"]
    lines.append(f"| **all but the UNet** | {rest:.2f} | **{rest / whole:.2%}** |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return the exit code."""
    return run_command(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> None:
    cli = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    cli.add_argument("--bundle", type=Path, help="default: the miniature")
    cli.add_argument("--size", type=int, default=512, help="pixels")
    cli.add_argument("--steps", type=int, default=2, help="steps that are measured")
    cli.add_argument("--of-steps", type=int, default=25, help="steps of the run that is told of")
    asked = cli.parse_args(arguments)
    print(table(profile(asked.bundle, size=asked.size, steps=asked.steps, of_steps=asked.of_steps)))
    print(
        f"\n{asked.size} px, three branches, {asked.of_steps} steps from {asked.steps}, "
        f"{os.cpu_count()} cores, Python {platform.python_version()}, {date.today()}"
    )


if __name__ == "__main__":
    sys.exit(main())
