"""The figures of a measurement, from its runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sld_edge.benchmarks.bench.memory import Phase
from sld_edge.benchmarks.bench.runs import BenchSettings, Run
from sld_edge.benchmarks.bench.summary import (
    Ratio,
    Summary,
    median,
    median_of_rounds,
    ratio,
    summary,
)

Samples = Callable[[Run], Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class PhaseFigures:
    """Memory in one phase, medians over the rounds, in bytes; None if unknown."""

    name: str
    peak: float | None
    anonymous: float | None
    mapped: float | None
    device: float | None


@dataclass(frozen=True, kw_only=True)
class BatchFigures:
    """A batch; `ratio` compares the time of a picture with that in the smallest batch."""

    batch: int
    batch_s: Summary
    pictures_per_s: float
    ratio: Ratio


@dataclass(frozen=True, kw_only=True)
class SafetyFigures:
    """A preset's price: ratios are to off.

    Attributes:
        name: the preset.
        branches: UNet branches a call, on average.
        step_s: seconds of a call, the median of the rounds' medians.
        step_ratio: of `step_s`.
        image_s: seconds of a picture.
        image_ratio: of `image_s`.
        cpu_ratio: of a picture's CPU time, all threads together.
        peak: bytes, None where the system does not say.
        peak_ratio: of `peak`.
        calls: median seconds of each call, in order.
    """

    name: str
    branches: float
    step_s: float
    step_ratio: Ratio
    image_s: float
    image_ratio: Ratio
    cpu_ratio: Ratio
    peak: float | None
    peak_ratio: Ratio | None
    calls: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """All figures of a bundle.

    Attributes:
        first_start_s: process start to ready with an empty cache; one sample.
        stages: seconds by name, of the reference preset.
        phases: memory of it.
        batches: throughput of it.
        safety: the price of safety.
    """

    first_start_s: float
    stages: dict[str, Summary]
    phases: Sequence[PhaseFigures]
    batches: Sequence[BatchFigures]
    safety: Sequence[SafetyFigures]


def figures(settings: BenchSettings, first: Run, runs: Sequence[Run]) -> Figures:
    """Return the figures of runs."""
    reference = [run for run in runs if (run.name, run.batch) == (settings.reference, 1)]
    stages: dict[str, Samples] = {
        "process start to ready": lambda run: [run.ready_s],
        "process start to first picture": lambda run: [run.first_image_s],
        "text": lambda run: [_known(run.text_s)],
        "a step": lambda run: run.steps_s,
        "decode": lambda run: [_known(run.decode_s)],
        "a picture": lambda run: [run.image_s],
        "a picture, CPU time": lambda run: [run.image_cpu_s],
    }
    return Figures(
        first_start_s=first.ready_s,
        stages={
            name: summary([sample for run in reference for sample in samples(run)])
            for name, samples in stages.items()
        },
        phases=_phases(reference),
        batches=_batches(settings, runs),
        safety=_safety(settings, runs),
    )


def _safety(settings: BenchSettings, runs: Sequence[Run]) -> list[SafetyFigures]:
    sides = {
        name: [run for run in runs if (run.name, run.batch) == (name, 1)]
        for name in settings.safety
    }
    off = sides["off"]
    prices = []
    for name, side in sides.items():
        peaks = [_numbers(run.peak) for run in side]
        known = all(peaks)
        branches = [count for run in side for count in run.branches]
        prices.append(
            SafetyFigures(
                name=name,
                branches=sum(branches) / len(branches),
                step_s=median_of_rounds([run.steps_s for run in side]),
                step_ratio=ratio([run.steps_s for run in side], [run.steps_s for run in off]),
                image_s=median([run.image_s for run in side]),
                image_ratio=ratio([[run.image_s] for run in side], [[run.image_s] for run in off]),
                cpu_ratio=ratio(
                    [[run.image_cpu_s] for run in side], [[run.image_cpu_s] for run in off]
                ),
                peak=median_of_rounds(peaks) if known else None,
                peak_ratio=ratio(peaks, [_numbers(run.peak) for run in off]) if known else None,
                calls=[median(each) for each in zip(*(run.steps_s for run in side), strict=True)],
            )
        )
    return prices


def _batches(settings: BenchSettings, runs: Sequence[Run]) -> list[BatchFigures]:
    sides = {
        batch: [run for run in runs if (run.name, run.batch) == (settings.reference, batch)]
        for batch in sorted(settings.batches)
    }
    smallest = next(iter(sides.values()))
    batches = []
    for batch, side in sides.items():
        taken = summary([run.image_s for run in side])
        batches.append(
            BatchFigures(
                batch=batch,
                batch_s=taken,
                pictures_per_s=batch / taken.median,
                ratio=ratio(
                    [[run.image_s / run.batch] for run in side],
                    [[run.image_s / run.batch] for run in smallest],
                ),
            )
        )
    return batches


def _phases(runs: Sequence[Run]) -> list[PhaseFigures]:
    def middle(phases: Sequence[Phase], name: str) -> float | None:
        values = [getattr(phase, name) for phase in phases]
        return median(values) if all(value is not None for value in values) else None

    return [
        PhaseFigures(
            name=phases[0].name,
            peak=middle(phases, "peak"),
            anonymous=middle(phases, "anonymous"),
            mapped=middle(phases, "mapped"),
            device=middle(phases, "device"),
        )
        for phases in zip(*(run.phases for run in runs), strict=True)
    ]


def _known(value: float | None) -> float:
    assert value is not None  # ours tells every stage
    return value


def _numbers(value: int | None) -> list[float]:
    return [float(value)] if value is not None else []
