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
from sld_edge.engines.openvino.target import CpuPrecision
from sld_edge.runtime.process_memory import Reading

T = TypeVar("T")
PROMPT = "a red star at a party"
OUR_WORKER = "sld_edge.benchmarks.bench.worker"


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """The options of a measurement, every default resolved; see `BenchOptions`.

    Attributes:
        bundle: None is the miniature.
        batches: pictures at once, with the reference preset.
        safety: presets, off among them.
        reference: the preset of stages, memory and throughput.
        threads: of the CPU engines; None: the engines choose.
    """

    bundle: Path | None
    provider: str
    device: str
    cpu_precision: CpuPrecision
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
    """The work of one process: pictures with a preset, `batch` at once."""

    safety: str
    batch: int


@dataclass(frozen=True, kw_only=True)
class Run:
    """One process: its times in seconds, and its memory in bytes.

    Attributes:
        name: a preset or a peer.
        batch: pictures at once.
        round: from 0.
        ready_s: from the process's start until everything is loaded.
        first_image_s: from the process's start to the first batch of pictures.
        image_s: the timed batch, all stages.
        image_cpu_s: CPU time of all threads for the timed batch.
        steps_s: each UNet call of the timed batch, with guidance and sampler.
        phases: of the first batch.
        peak: most memory that was ever resident; None where the system does not say.
        anonymous: most anonymous memory in a sample; None where the system does not say.
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
    """Return every preset alone, and the reference preset in every batch."""
    alone = [Cell(name, 1) for name in settings.safety]
    together = [Cell(settings.reference, batch) for batch in settings.batches]
    return tuple(dict.fromkeys((*alone, *together)))


def interleaved(items: Sequence[T], rounds: int) -> Iterator[tuple[int, T]]:
    """Yield the round's number and an item, every item once a round.

    Each round starts with another item, so no item is always measured first.
    """
    for number in range(rounds):
        start = number % len(items)
        for item in (*items[start:], *items[:start]):
            yield number, item


def measure(
    settings: BenchSettings, environment: Mapping[str, str], watch: Callable[[str], object]
) -> tuple[Run, list[Run]]:
    """Return the first start with an empty cache, and the runs of all rounds, in order.

    Args:
        settings: of the measurement.
        environment: of the processes; its cache is empty.
        watch: gets the name of each finished measurement.

    Raises:
        EngineError: a process ended without an answer.
    """

    def run(cell: Cell, number: int) -> Run:
        task = Task(
            bundle=str(settings.bundle) if settings.bundle is not None else None,
            provider=settings.provider,
            device=settings.device,
            cpu_precision=settings.cpu_precision,
            prompt=PROMPT,
            safety=cell.safety,
            steps=settings.steps,
            size=settings.size,
            batch=cell.batch,
            warmup=settings.warmup,
        )
        name = f"{cell.safety}, {cell.batch} at once"
        outcome = run_ours(task, f"safety {name}", environment)
        watch(name)
        return run_from_outcome(outcome, name=cell.safety, batch=cell.batch, number=number)

    first = run(Cell(settings.reference, 1), 0)
    rounds = interleaved(cells(settings), settings.rounds)
    return first, [run(cell, number) for number, cell in rounds]


def run_ours(task: Task, name: str, environment: Mapping[str, str]) -> Outcome:
    """Run a task in a process of our own; `name` stands in errors.

    Raises:
        EngineError: the process ended without an answer.
    """
    command = [sys.executable, "-m", OUR_WORKER]
    return run_child(command, asdict(task), name=name, environment=environment)


def run_from_outcome(outcome: Outcome, *, name: str, batch: int, number: int) -> Run:
    """Join a process's answer and the readings of its memory."""
    answer = outcome.answer
    phases = [sampled(Phase(**phase), outcome.readings) for phase in answer["phases"]]
    # A phase's peak is read before it is reset; the readings hold the peak of the rest.
    moments: list[Phase | Reading] = [*phases, *outcome.readings]
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
        peak=_most(moment.peak for moment in moments),
        anonymous=_most(moment.anonymous for moment in moments),
        text_s=answer.get("text_s"),
        decode_s=answer.get("decode_s"),
        branches=answer.get("branches", ()),
    )


def _most(values: Iterable[int | None]) -> int | None:
    return max((value for value in values if value is not None), default=None)
