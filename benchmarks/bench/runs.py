"""Measurements of a bundle: their order, and the processes that make them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from sld_edge.benchmarks.bench.child import Outcome, run_child
from sld_edge.benchmarks.bench.memory import Phase, sampled
from sld_edge.benchmarks.bench.worker import Task

T = TypeVar("T")
PROMPT = "a red star at a party"
OUR_WORKER = "sld_edge.benchmarks.bench.worker"


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What is measured, every default resolved.

    Attributes:
        bundle: None is the miniature.
        provider: the provider that runs it.
        size: width and height in pixels.
        steps: denoising steps.
        rounds: of all cells, interleaved; a cell is a fresh process in each round.
        warmup: batches a process makes before the one that is timed.
        batches: pictures at once, with the reference preset.
        safety: presets, off among them.
        reference: the preset of stages, memory and throughput.
        threads: of the CPU engines; None: the engines choose.
    """

    bundle: Path | None
    provider: str
    size: int
    steps: int
    rounds: int
    warmup: int
    batches: tuple[int, ...]
    safety: tuple[str, ...]
    reference: str
    threads: int | None


@dataclass(frozen=True, order=True)
class Cell:
    """What one process makes: pictures with a preset, `batch` at once."""

    safety: str
    batch: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """One process: what it took, in seconds, and its memory.

    Attributes:
        name: a preset or a peer.
        batch: pictures at once.
        round: from 0.
        ready_s: process start to everything loaded.
        first_image_s: process start to the first batch of pictures.
        image_s: the timed batch, all stages.
        image_cpu_s: CPU time of all threads for the timed batch.
        steps_s: each UNet call of it, with guidance and sampler.
        phases: of the first batch.
        peak: most bytes that were ever resident; None where the system does not say.
        anonymous: most bytes that were anonymous in a sample; likewise.
        text_s: text stage of the timed batch; None for a peer.
        decode_s: decoder of the timed batch; None for a peer.
        branches: of each UNet call; empty for a peer.
    """

    name: str
    batch: int
    round: int
    ready_s: float
    first_image_s: float
    image_s: float
    image_cpu_s: float
    steps_s: Sequence[float]
    phases: Sequence[Phase]
    peak: int | None
    anonymous: int | None
    text_s: float | None = None
    decode_s: float | None = None
    branches: Sequence[int] = ()


def cells(settings: BenchSettings) -> tuple[Cell, ...]:
    """Return what is measured: every preset alone, and the reference preset in every batch."""
    alone = [Cell(name, 1) for name in settings.safety]
    together = [Cell(settings.reference, batch) for batch in settings.batches]
    return tuple(dict.fromkeys((*alone, *together)))


def interleaved(items: Sequence[T], rounds: int) -> Iterator[tuple[int, T]]:
    """Give every item once a round, each round starting with another, and the round's number.

    So nothing is always measured first, or always after the same neighbour's start of a round.
    """
    for number in range(rounds):
        start = number % len(items)
        for item in (*items[start:], *items[:start]):
            yield number, item


def run_cell(
    settings: BenchSettings, cell: Cell, number: int, environment: Mapping[str, str]
) -> Run:
    """Measure a cell in a process of its own.

    Raises:
        EngineError: the process ended without an answer.
    """
    task = Task(
        bundle=str(settings.bundle) if settings.bundle is not None else None,
        provider=settings.provider,
        prompt=PROMPT,
        safety=cell.safety,
        steps=settings.steps,
        size=settings.size,
        batch=cell.batch,
        warmup=settings.warmup,
    )
    outcome = run_child(
        [sys.executable, "-m", OUR_WORKER],
        asdict(task),
        name=f"safety {cell.safety}, {cell.batch} at once",
        environment=environment,
    )
    return run_from_outcome(outcome, name=cell.safety, batch=cell.batch, number=number)


def run_from_outcome(outcome: Outcome, *, name: str, batch: int, number: int) -> Run:
    """Put together a process's answer and its memory as read from outside."""
    answer = outcome.answer
    phases = [sampled(Phase(**phase), outcome.readings) for phase in answer["phases"]]
    peaks = [phase.peak for phase in phases]  # before each reset; the last reading has the rest
    peaks += [reading.peak for reading in outcome.readings]
    anonymous = [phase.anonymous for phase in phases]
    anonymous += [reading.anonymous for reading in outcome.readings]
    return Run(
        name=name,
        batch=batch,
        round=number,
        ready_s=phases[0].end - outcome.started,
        first_image_s=answer["first_done"] - outcome.started,
        image_s=answer["image_s"],
        image_cpu_s=answer["image_cpu_s"],
        steps_s=answer["steps_s"],
        phases=phases,
        peak=_most(peaks),
        anonymous=_most(anonymous),
        text_s=answer.get("text_s"),
        decode_s=answer.get("decode_s"),
        branches=answer.get("branches", ()),
    )


def measure(
    settings: BenchSettings, environment: Mapping[str, str], watch: Callable[[str], object]
) -> tuple[Run, list[Run]]:
    """Return the first start with an empty cache, and the runs of all rounds, in order.

    Args:
        settings: what is measured.
        environment: of the processes; its cache is empty.
        watch: gets the name of each finished measurement.
    """
    first = run_cell(settings, Cell(settings.reference, 1), 0, environment)
    watch("first start")
    runs = []
    for number, cell in interleaved(cells(settings), settings.rounds):
        runs.append(run_cell(settings, cell, number, environment))
        watch(f"{cell.safety}, {cell.batch} at once")
    return first, runs


def _most(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
