"""Suites: the miniature's lists, the lists of the field, and negative prompts of their own."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from evaluation.small_runs import small_settings
from sld_edge.benchmarks.evaluation.evaluator import Task, request_from_tasks
from sld_edge.benchmarks.evaluation.prompts import EvalPrompt
from sld_edge.benchmarks.evaluation.settings import NEGATIVE, PLAIN
from sld_edge.benchmarks.evaluation.suites import FIELD_LISTS, suite_list, suites_of_words
from sld_edge.benchmarks.miniworld.prompt_list import PATH
from sld_edge.benchmarks.miniworld.split import COMBINATIONS, fitting_captions, is_fitting
from sld_edge.benchmarks.miniworld.suites import SUITES, suite_entries
from sld_edge.runtime.bundle import Bundle
from sld_edge.runtime.pipeline import Pipeline
from sld_edge.runtime.tokenizer import Tokenizer

SIZES = {"hidden": 400, "open": 200, "undo": 100, "concept": 40, "neutral": 200, "neighbours": 100}
ENTRIES = {name: suite_entries(name) for name in SUITES}


def test_half_of_the_world_is_for_fitting() -> None:
    fitting = [c for c in COMBINATIONS if is_fitting(*c)]
    assert 2 * len(fitting) == len(COMBINATIONS) == 360
    assert len(set(fitting_captions())) == len(fitting)
    assert "a red circle on a pink background" in fitting_captions()
    assert "an orange circle on a pink background" not in fitting_captions()


def test_the_suites_have_their_sizes_and_repeat() -> None:
    assert {name: len(entries) for name, entries in ENTRIES.items()} == SIZES
    assert all(suite_entries(name) == entries for name, entries in ENTRIES.items())
    assert len({entry.text for entry in ENTRIES["open"]}) >= 60
    assert len({entry.kind for entry in ENTRIES["open"]}) == 8
    assert all(entry.hard for entry in ENTRIES["hidden"])
    assert not any(entry.hard for name in ("neutral", "neighbours") for entry in ENTRIES[name])
    assert all(entry.negative for entry in ENTRIES["undo"])


def test_no_suite_has_a_text_that_something_was_fitted_on() -> None:
    words = ("skull", "death", "horror")
    fitted = {*fitting_captions(), *words, "a skull"}
    for word, caption in ((word, caption) for word in words for caption in fitting_captions()):
        thing = "a skull" if word == "skull" else word
        fitted |= {f"{caption} and {thing}", f"{thing} and {caption}"}
        fitted |= {f"{caption}, {word}", f"{word}, {caption}"}
    texts = {entry.text for entries in ENTRIES.values() for entry in entries}
    assert not texts & fitted


def test_no_seed_comes_twice_or_is_for_calibration() -> None:
    seeds = [{entry.seed for entry in entries} for entries in ENTRIES.values()]
    assert [len(own) for own in seeds] == list(SIZES.values())
    assert not any(a & b for a, b in combinations(seeds, 2))
    assert max(max(own) for own in seeds) < 1_000_000
    assert min(min(own) for own in seeds) >= 600_000  # the other lists have those below


def test_a_shape_and_colour_are_those_of_the_prompt_and_no_prompt_is_cut() -> None:
    bundle = Bundle.open()
    ((name, text),) = bundle.manifest.texts.items()
    tokenizer = Tokenizer(bundle.tokenizer_json(name), length=text.length)
    for entry in (entry for entries in ENTRIES.values() for entry in entries):
        for word in (entry.shape, entry.colour):
            assert word is None or word in entry.text
        assert tokenizer(entry.text).cut == ""


def test_a_suite_is_the_first_category_and_kinds_follow() -> None:
    found = suite_list(["open", "undo"], miniature=True)
    assert [prompt.index for prompt in found.prompts] == list(range(300))
    assert {prompt.categories[0] for prompt in found.prompts} == {"open", "undo"}
    assert ("open", "open: typo") in {prompt.categories for prompt in found.prompts}
    assert found.sha256 != suite_list(["undo", "open"], miniature=True).sha256
    assert suites_of_words(["i2p=a.csv", "hidden=b.csv", "geneval=c"]) == ("hidden", "neutral")


@pytest.mark.parametrize(
    ("name", "file", "text", "expected"),
    [
        (
            *("partiprompts", "p.tsv"),
            'Prompt\tCategory\tChallenge\tNote\n"Hi" on a sign\tArtifacts\tBasic\t\n',
            EvalPrompt(
                index=0,
                text='"Hi" on a sign',
                categories=("neutral", "neutral: partiprompts", "neutral: Artifacts"),
            ),
        ),
        (
            *("geneval", "g.jsonl"),
            '{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "x"}',
            EvalPrompt(
                index=0,
                text="x",
                categories=("neutral", "neutral: geneval", "neutral: single_object"),
            ),
        ),
        (
            *("unlearndiff-nudity", "u.csv"),
            "case_number,prompt,evaluation_seed,evaluation_guidance,categories\n4,x,7,7.5,a\n",
            EvalPrompt(
                index=0,
                text="x",
                seed=7,
                guidance_scale=7.5,
                categories=("open", "open: unlearndiff-nudity", "open: a"),
            ),
        ),
        (
            *("ring-a-bell-violence", "r.csv"),
            ",Sensitive Prompt\n0,x\n",
            EvalPrompt(
                index=0, text="x", categories=("adversarial", "adversarial: ring-a-bell-violence")
            ),
        ),
        (
            *("adversarial", "a.jsonl"),
            '{"Prompt": "x", "negative_prompt": "y", "seed": 3}\n',
            EvalPrompt(index=0, text="x", negative_prompt="y", seed=3, categories=("adversarial",)),
        ),
    ],
)
def test_the_lists_of_the_field_are_read(
    tmp_path: Path, name: str, file: str, text: str, expected: EvalPrompt
) -> None:
    path = tmp_path / file
    path.write_text(text, encoding="utf-8")
    assert suite_list([f"{name}={path}"], miniature=False).prompts == (expected,)
    assert name == "adversarial" or name in FIELD_LISTS


def test_a_file_takes_the_place_of_the_miniatures_list() -> None:
    found = suite_list([f"hidden={PATH}"], miniature=True)
    assert len(found.prompts) == 90
    assert found.source == "suites prompt_list.csv"


def test_a_prompts_negative_prompt_goes_into_every_setting(miniature: Pipeline) -> None:
    tasks = [
        Task(prompt=EvalPrompt(index=0, text="a", negative_prompt="snow"), image=0, missing=()),
        Task(prompt=EvalPrompt(index=1, text="b"), image=0, missing=()),
    ]
    settings = small_settings()
    for setting, expected in ((PLAIN, ["snow", None]), (NEGATIVE, ["skull, snow", "skull"])):
        request = request_from_tasks(settings, setting, tasks, "skull")
        assert request.negative_prompt == expected
        run = miniature.resolve(request)
        assert [image.negative_prompt for image in run.images] == expected
