"""Suites: prompt lists that measure one property of safety each, together in one run.

A prompt's first category is its suite, and its further categories are its kinds: "open: typo". The
miniature has lists of its own; for another bundle, and for the lists of the field, the user names a
file. No list of the field is part of this package.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

from sld_edge.benchmarks.evaluation.prompts import (
    EvalPrompt,
    PromptList,
    list_from_prompts,
    read_prompts,
)
from sld_edge.benchmarks.miniworld.suites import SUITES as MINIATURE_SUITES
from sld_edge.benchmarks.miniworld.suites import suite_entries
from sld_edge.engines.errors import InputError

SUITES: Final = ("hidden", "open", "undo", "concept", "adversarial", "neutral", "neighbours")
FIELD_LISTS: Final = MappingProxyType(
    {
        "i2p": "hidden",
        "unlearndiff-nudity": "open",
        "unlearndiff-violence": "open",
        "unlearndiff-illegal": "open",
        "ring-a-bell-violence": "adversarial",
        "partiprompts": "neutral",
        "geneval": "neutral",
    }
)
"""The suite of each list of the field."""


def suite_list(words: Sequence[str], *, miniature: bool) -> PromptList:
    """Return the prompts of all suites that are named, as NAME or NAME=FILE.

    Raises:
        InputError: an unknown name, a name twice, a suite without its file, or a broken file.
    """
    names = [word.partition("=")[0] for word in words]
    prompts: list[EvalPrompt] = []
    notes: list[str] = []
    for word in words:
        name, sign, file = word.partition("=")
        if name not in SUITES and name not in FIELD_LISTS:
            expected = f"one of {', '.join((*SUITES, *FIELD_LISTS))}"
            raise InputError("--suite", got=repr(name), expected=expected)
        if names.count(name) > 1:
            raise InputError("--suite", got=f"{name} twice", do="name it once")
        if sign:
            listed = read_prompts(Path(file))
            prompts += _prompts_of_suite(listed.prompts, name)
            notes += [f"{name}: {note}" for note in listed.notes]
        elif miniature and name in MINIATURE_SUITES:
            prompts += _prompts_of_suite(tuple(_miniature_prompts(name)), name)
        else:
            raise InputError(f"--suite {name} has no list", do=f"name its file: {name}=FILE")
    numbered = [replace(prompt, index=index) for index, prompt in enumerate(prompts)]
    files = (Path(file).name for file in words)
    return list_from_prompts(numbered, source=f"suites {', '.join(files)}", notes=notes)


def suites_of_words(words: Sequence[str]) -> tuple[str, ...]:
    """Return the suites that the words of `--suite` name, each once."""
    names = (word.partition("=")[0] for word in words)
    return tuple(dict.fromkeys(FIELD_LISTS.get(name, name) for name in names))


def _prompts_of_suite(prompts: Sequence[EvalPrompt], name: str) -> Iterator[EvalPrompt]:
    suite = FIELD_LISTS.get(name, name)
    of_list = (name,) if name in FIELD_LISTS else ()
    for prompt in prompts:
        kinds = (f"{suite}: {kind}" for kind in (*of_list, *prompt.categories))
        yield replace(prompt, categories=tuple(dict.fromkeys((suite, *kinds))))


def _miniature_prompts(name: str) -> Iterator[EvalPrompt]:
    for index, entry in enumerate(suite_entries(name)):
        yield EvalPrompt(
            index=index,
            text=entry.text,
            categories=(entry.kind,),
            hard=entry.hard,
            seed=entry.seed,
            shape=entry.shape,
            colour=entry.colour,
            negative_prompt=entry.negative,
        )
