"""What is measured and in which order."""

from __future__ import annotations

from collections import Counter

from sld_edge.benchmarks.bench.runs import BenchSettings, Cell, cells, interleaved


def test_every_round_has_everything_once_and_starts_elsewhere() -> None:
    order = list(interleaved(["a", "b", "c"], 4))
    assert order == [
        *((0, "a"), (0, "b"), (0, "c")),
        *((1, "b"), (1, "c"), (1, "a")),
        *((2, "c"), (2, "a"), (2, "b")),
        *((3, "a"), (3, "b"), (3, "c")),
    ]
    places = Counter((item, index % 3) for index, (_, item) in enumerate(order[:9]))
    assert set(places.values()) == {1}  # over as many rounds as items, each in each place once


def test_presets_alone_and_the_reference_in_every_batch_once() -> None:
    settings = BenchSettings(
        bundle=None,
        provider="cpu",
        device="CPU",
        cpu_precision="fp32",
        size=64,
        steps=2,
        rounds=1,
        warmup=0,
        batches=(1, 4),
        safety=("off", "medium", "max"),
        reference="medium",
        threads=None,
    )
    assert cells(settings) == (
        *(Cell("off", 1), Cell("medium", 1), Cell("max", 1)),
        Cell("medium", 4),
    )
