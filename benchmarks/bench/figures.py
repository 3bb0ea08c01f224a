"""The figures of a measurement, from its runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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
        phases: memory of the reference preset.
        batches: throughput of the reference preset.
        safety: the price of safety.
    """

    first_start_s: float
    stages: Mapping[str, Summary]
    phases: Sequence[PhaseFigures]
    batches: Sequence[BatchFigures]
    safety: Sequence[SafetyFigures]


_STAGES: Mapping[str, Samples] = {
    "process start to ready": lambda run: [run.ready_s],
    "process start to first picture": lambda run: [run.first_image_s],
    "text": lambda run: known(run.text_s),
    "a step": lambda run: run.steps_s,
    "decode": lambda run: known(run.decode_s),
    "a picture": lambda run: [run.image_s],
    "a picture, CPU time": lambda run: [run.image_cpu_s],
}


def figures(settings: BenchSettings, first: Run, runs: Sequence[Run]) -> Figures:
    """Return the figures of runs; `first` is the first start ever."""
    sides: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        sides.setdefault((run.name, run.batch), []).append(run)
    reference, off = sides[settings.reference, 1], sides["off", 1]
    batches = {batch: sides[settings.reference, batch] for batch in sorted(settings.batches)}
    smallest = next(iter(batches.values()))
    return Figures(
        first_start_s=first.ready_s,
        stages={
            name: summary([sample for run in reference for sample in samples(run)])
            for name, samples in _STAGES.items()
        },
        phases=_phases(reference),
        batches=[_batch(batch, side, smallest) for batch, side in batches.items()],
        safety=[_price(name, sides[name, 1], off) for name in settings.safety],
    )


def known(value: float | None) -> list[float]:
    """Return a value as a list of samples; empty where the value is not known."""
    return [] if value is None else [float(value)]


def _price(name: str, side: Sequence[Run], off: Sequence[Run]) -> SafetyFigures:
    def to_off(samples: Samples) -> Ratio:
        return ratio([samples(run) for run in side], [samples(run) for run in off])

    branches = [count for run in side for count in run.branches]
    peaks = all(run.peak is not None for run in side)
    return SafetyFigures(
        name=name,
        branches=sum(branches) / len(branches),
        step_s=median_of_rounds([run.steps_s for run in side]),
        step_ratio=to_off(lambda run: run.steps_s),
        image_s=median([run.image_s for run in side]),
        image_ratio=to_off(lambda run: [run.image_s]),
        cpu_ratio=to_off(lambda run: [run.image_cpu_s]),
        peak=median_of_rounds([known(run.peak) for run in side]) if peaks else None,
        peak_ratio=to_off(lambda run: known(run.peak)) if peaks else None,
        calls=[median(each) for each in zip(*(run.steps_s for run in side), strict=True)],
    )


def _batch(batch: int, side: Sequence[Run], smallest: Sequence[Run]) -> BatchFigures:
    taken = summary([run.image_s for run in side])
    a_picture = [[[run.image_s / run.batch] for run in runs] for runs in (side, smallest)]
    return BatchFigures(
        batch=batch,
        batch_s=taken,
        pictures_per_s=batch / taken.median,
        ratio=ratio(*a_picture),
    )


def _phases(runs: Sequence[Run]) -> list[PhaseFigures]:
    rounds = list(zip(*(run.phases for run in runs), strict=True))

    def middle(phase: int, kind: str) -> float | None:
        values = [getattr(each, kind) for each in rounds[phase]]
        return None if None in values else median(values)

    kinds = ("peak", "anonymous", "mapped", "device")
    return [
        PhaseFigures(name=phases[0].name, **{kind: middle(index, kind) for kind in kinds})
        for index, phases in enumerate(rounds)
    ]
