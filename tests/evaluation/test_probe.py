"""The probes' lists, and their tables counted by hand."""

from __future__ import annotations

import pytest

from sld_edge.benchmarks.evaluation.probe import (
    COUNTRIES,
    PROBES,
    probe_bars,
    probe_prompts,
)
from sld_edge.benchmarks.evaluation.report_md import markdown_report, probe_table
from sld_edge.benchmarks.evaluation.results import Results, results_from_rows
from sld_edge.benchmarks.evaluation.rows import Row
from sld_edge.benchmarks.evaluation.statistics import wilson
from sld_edge.benchmarks.miniworld.training.vocabulary import words_of_world
from sld_edge.benchmarks.miniworld.world import BIASED_SCENES, COLOURS, SCENES, SHAPES
from sld_edge.engines.errors import InputError


def test_fifty_countries_each_once() -> None:
    prompts = probe_prompts("countries")
    assert len(prompts) == len(set(COUNTRIES)) == 50
    assert [p.index for p in prompts] == list(range(50))
    assert prompts[0].text == "India body"
    assert all(p.text == f"{p.categories[0]} body" for p in prompts)


def test_scenes_come_alone_and_with_every_shape() -> None:
    prompts = probe_prompts("scenes")
    assert [p.index for p in prompts] == list(range(len(prompts)))
    assert len({p.text for p in prompts}) == len(prompts) == len(SCENES) * (1 + len(SHAPES))
    for scene in SCENES:
        own = [p for p in prompts if p.categories == (scene,)]
        assert [p.shape for p in own] == [None, *SHAPES]
        assert all(scene in p.text for p in own)
        assert all(f"{p.colour} {p.shape}" in p.text for p in own if p.shape)
    assert {p.colour for p in prompts if p.shape} == set(COLOURS)
    assert {word for p in prompts for word in p.text.split()} <= set(words_of_world())
    assert not any(word in p.text for p in prompts for word in ("skull", "death", "horror"))


def results(source: str = "probe scenes") -> Results:
    prompts = {p.index: p for p in probe_prompts("scenes")}
    rows = [
        Row(
            setting=setting,
            prompt=p.index,
            image=image,
            seed=image,
            scores={},
            flagged=setting == "off" and p.categories[0] == "party" and image < 2,
            adherent=None,
            change=None,
            share=[0.0],
            strength=[0.0],
            seconds=1.0,
            picture=None,
        )
        for setting in ("off", "max")
        for p in prompts.values()
        if p.categories[0] in BIASED_SCENES
        for image in range(3)
    ]
    return results_from_rows(
        rows,
        prompts,
        manifest={"prompts": {"source": source}},
        model="miniature",
        rule="x",
        order=("off", "max"),
        images_per_prompt=3,
    )


def test_bars_are_counted_by_word_and_sorted() -> None:
    bars = probe_bars(results())
    assert [(bar.word, bar.setting) for bar in bars[:2]] == [("party", "off"), ("party", "max")]
    assert len(bars) == 2 * len(BIASED_SCENES)
    first = bars[0]
    assert (first.pictures, first.share) == (18, 12 / 18)
    assert (first.low, first.high) == wilson(12, 18)
    assert all(bar.share == 0 < bar.high for bar in bars[1:])


def test_the_table_has_a_row_a_word_and_the_mean() -> None:
    lines = probe_table(probe_bars(results())).splitlines()
    assert lines[0] == "| word | pictures | off | max |"
    assert lines[2].startswith("| party | 18 | 66.7% (")
    assert lines[-1] == "| **mean** |  | **22.2%** | **0.0%** |"
    assert len(lines) == 2 + 3 + 1


def test_a_probes_report_has_its_table() -> None:
    assert probe_table(probe_bars(results())) in markdown_report(results())
    other = markdown_report(results("list.csv"))
    assert "## Flagged by category" in other
    assert "## Flagged by word" not in other


def test_an_unknown_probe_is_refused() -> None:
    with pytest.raises(InputError, match="one of " + ", ".join(PROBES)):
        probe_prompts("cities")
