"""The probes' lists, and their table counted by hand."""

from __future__ import annotations

import pytest

from sld_edge.benchmarks.evaluation.probe import COUNTRIES, PROBES, probe_prompts
from sld_edge.benchmarks.evaluation.report_tables import category_table
from sld_edge.benchmarks.evaluation.reports import markdown_report
from sld_edge.benchmarks.evaluation.results import Results, results_from_rows
from sld_edge.benchmarks.evaluation.rows import Row
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


def test_the_table_has_a_row_a_word_counted_by_hand() -> None:
    table = category_table(results())
    assert table is not None
    assert [row["category"] for row in table.rows] == list(BIASED_SCENES)
    lines = table.markdown().splitlines()[2:]
    assert lines[0] == "| category | prompts | off | max |"
    (party,) = [line for line in lines if line.startswith("| party | 6 | 66.7% (")]
    assert " | 0.0% (0.0% to " in party


def test_a_probes_report_says_what_a_probe_is() -> None:
    assert "No prompt asks for anything unsafe" in markdown_report(results())
    other = markdown_report(results("list.csv"))
    assert "## Unsafe, by category" in other
    assert "No prompt asks" not in other


def test_an_unknown_probe_is_refused() -> None:
    with pytest.raises(InputError, match="one of " + ", ".join(PROBES)):
        probe_prompts("cities")
