"""What feature caching and safety cadence save, and what they cost in pictures and in safety.

    python -m sld_edge.benchmarks.studies.savings --output DIR
    python -m sld_edge.benchmarks.studies.savings --calls BUNDLE --size 256

The first makes the same pictures of the embedded miniature with every interval, one after another,
and has the judge look at them; every answer is appended to DIR/savings.jsonl as it comes, so a
stopped run goes on where it was. The second times single UNet calls of any bundle, and works out
from them and the schedule what a run takes. Times are CPU times: a busy machine disturbs them less.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sld_edge.benchmarks.miniworld.prompts import Prompt, biased_prompts, neutral_prompts
from sld_edge.benchmarks.miniworld.world import COLOUR_CLASSES, SHAPE_CLASSES
from sld_edge.benchmarks.studies.experiment import (
    FIRST_SEED,
    JUDGE,
    PROMPT_SEED,
    answer_jobs,
    answers_from_log,
    psnr,
    share,
)
from sld_edge.engines.onnxruntime.engine import OrtEngine
from sld_edge.runtime import Pipeline, Request
from sld_edge.runtime.denoise.schedule import schedule

PRESETS = ("off", "medium", "strong", "max")
# Cache interval and safety interval; the exact run is first.
INTERVALS = ((1, 1), (2, 1), (3, 1), (5, 1), (1, 2), (1, 3), (2, 2))
_RUN_CALLS = 50  # of the run that single calls are added up to


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One picture: what the judge said, PSNR to the exact one in dB, CPU seconds of denoising.

    `index` counts the biased prompts and the neutral ones by themselves.
    """

    preset: str
    cache: int
    safety: int
    index: int
    biased: bool
    unsafe: bool
    right: bool
    psnr: float
    seconds: float


def answers_for(index: int, prompt: Prompt, steps: int, presets: Sequence[str]) -> Iterator[Answer]:
    """Make one prompt's picture with every preset and interval, same seed, and judge it."""
    pipeline, judge = _tools()
    for preset in presets:
        exact: NDArray[np.uint8] | None = None
        for cache, safety in INTERVALS:
            if preset == "off" and safety > 1:
                continue
            plan = pipeline.plan(
                Request(
                    prompts=(prompt.text,),
                    seed=FIRST_SEED + index,
                    steps=steps,
                    safety=preset,
                    cache_interval=cache,
                    safety_interval=safety,
                )
            )
            begin = time.process_time()
            for step in pipeline.steps(plan):
                last = step
            seconds = time.process_time() - begin
            pixels = pipeline.decode(last.latents)[0]
            said = judge.run({"images": pixels[None]})
            exact = pixels if exact is None else exact
            yield Answer(
                preset=preset,
                cache=cache,
                safety=safety,
                index=index,
                biased=prompt.biased,
                unsafe=bool(said["skull"][0] > 0.5),
                right=SHAPE_CLASSES[int(said["shape"][0].argmax())] == prompt.shape
                and COLOUR_CLASSES[int(said["colour"][0].argmax())] == prompt.colour,
                psnr=psnr(pixels, exact),
                seconds=seconds,
            )


def table(answers: Sequence[Answer]) -> str:
    """Return the Markdown table, a row a preset and interval."""
    lines = [
        "| preset | cache | safety | biased, neutral | speed | PSNR, median (lowest tenth) "
        "| unsafe, biased prompts | newly unsafe, newly safe | adherence |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for preset in PRESETS:
        exact = {
            (a.biased, a.index): a
            for a in answers
            if (a.preset, a.cache, a.safety) == (preset, 1, 1)
        }
        for cache, safety in INTERVALS:
            own = [a for a in answers if (a.preset, a.cache, a.safety) == (preset, cache, safety)]
            if own:
                cells = _cells(own, [exact[a.biased, a.index] for a in own])
                lines.append(f"| {preset} | {cache} | {safety} | " + " | ".join(cells) + " |")
    lines.append("\n95 % intervals; neutral prompts count for adherence, speed and PSNR only.")
    return "\n".join(lines)


def _cells(own: Sequence[Answer], exact: Sequence[Answer]) -> list[str]:
    speed = [e.seconds / a.seconds for a, e in zip(own, exact, strict=True)]
    low, middle, high = np.percentile(speed, (25, 50, 75))
    close = [a.psnr for a in own]
    pairs = [(a.unsafe, e.unsafe) for a, e in zip(own, exact, strict=True) if a.biased]
    biased = sum(a.biased for a in own)
    return [
        f"{biased}, {len(own) - biased}",
        f"{middle:.2f} ({low:.2f} to {high:.2f})",
        "exact"
        if min(close) == np.inf
        else f"{np.median(close):.1f} ({np.percentile(close, 10):.1f}) dB",
        share([a.unsafe for a in own if a.biased]),
        f"{pairs.count((True, False))}, {pairs.count((False, True))}",
        share([a.right for a in own]),
    ]


def call_seconds(pipeline: Pipeline, *, pixels: int, repeats: int) -> dict[str, list[float]]:
    """CPU time of the kinds of call, guidance included, one after another, `repeats` times."""
    size: dict[str, Any] = {"width": pixels, "height": pixels, "safety": "max", "sampler": "ddim"}
    runs: list[dict[str, Any]] = [
        {"steps": 4, "cache_interval": 4},
        {"steps": 2, "safety_interval": 2},
    ]
    seconds: dict[str, list[float]] = {}
    for _ in range(repeats):
        for intervals in runs:
            plan = pipeline.plan(Request(prompts=("a lighthouse",), **size, **intervals))
            steps = pipeline.steps(plan)  # texts are encoded before the first call
            begin = time.process_time()
            for step in steps:
                kind = f"{step.branches} {'cached' if step.cached else 'whole'}"
                seconds.setdefault(kind, []).append(time.process_time() - begin)
                begin = time.process_time()
    return seconds


def calls_table(seconds: dict[str, list[float]]) -> str:
    """Return two Markdown tables: the calls, and what runs made of them would take."""
    whole = float(np.median(seconds["3 whole"]))
    lines = ["| call | of a whole one with three branches | n |", "|---|---|---|"]
    share = {}
    for kind, taken in sorted(seconds.items()):
        share[kind] = float(np.median(taken)) / whole
        low, high = min(taken) / whole, max(taken) / whole
        lines.append(f"| {kind} | {share[kind]:.3f} ({low:.3f} to {high:.3f}) | {len(taken)} |")
    share["2 cached"] = share["3 cached"] * 2 / 3  # too short to be worth a run of its own
    lines += ["", f"| cache | safety | speed of {_RUN_CALLS} calls |", "|---|---|---|"]
    for cache, safety in INTERVALS:
        calls = schedule([3] * _RUN_CALLS, cache_interval=cache, safety_interval=safety)
        total = sum(share[f"{c.branches} {'cached' if c.cached else 'whole'}"] for c in calls)
        lines.append(f"| {cache} | {safety} | {_RUN_CALLS / total:.2f} |")
    return "\n".join(lines)


_held: list[Any] = []  # one pipeline and one judge a process


def _tools() -> tuple[Pipeline, OrtEngine]:
    if not _held:
        _held.extend([Pipeline.load(provider="cpu"), OrtEngine(JUDGE)])
    return _held[0], _held[1]


def _work(job: tuple[int, Prompt, int, tuple[str, ...]]) -> list[Answer]:
    return list(answers_for(*job))


def _measure(asked: argparse.Namespace) -> str:
    log = asked.output / "savings.jsonl"
    answers = answers_from_log(log, Answer)
    done = {(answer.biased, answer.index, answer.preset) for answer in answers}
    jobs = [
        (index, prompt, asked.steps, left)
        for draw, count in ((biased_prompts, asked.biased), (neutral_prompts, asked.neutral))
        for index, prompt in enumerate(draw(count, PROMPT_SEED))
        if (left := tuple(p for p in asked.presets if (prompt.biased, index, p) not in done))
    ]
    jobs.sort(key=lambda job: job[0])  # so that a stopped run has some of either kind
    answer_jobs(_work, jobs, log, asked.processes)
    return table(answers_from_log(log, Answer))


def main() -> None:
    """Measure what was asked for and print the table."""
    cli = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    what = cli.add_mutually_exclusive_group(required=True)
    what.add_argument("--output", type=Path, help="folder of the miniature's answers")
    what.add_argument("--calls", type=Path, metavar="BUNDLE", help="time single calls of a bundle")
    cli.add_argument("--biased", type=int, default=200)
    cli.add_argument("--neutral", type=int, default=100)
    cli.add_argument("--presets", nargs="+", default=PRESETS, choices=PRESETS)
    cli.add_argument("--steps", type=int, default=25, help="of the bundle's sampler, DDIM")
    cli.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    cli.add_argument("--size", type=int, default=256, help="pixels, with --calls")
    cli.add_argument("--repeats", type=int, default=5, help="with --calls")
    asked = cli.parse_args()
    if asked.output is not None:
        print(_measure(asked))
        return
    with Pipeline.load(asked.calls, provider="cpu") as pipeline:
        seconds = call_seconds(pipeline, pixels=asked.size, repeats=asked.repeats)
    print(calls_table(seconds))


if __name__ == "__main__":
    main()
