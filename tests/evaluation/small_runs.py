"""A run of the miniature model that takes seconds, and what tests compare of it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from sld_edge.benchmarks.evaluation.prompts import EvalPrompt, PromptList
from sld_edge.benchmarks.evaluation.rows import read_rows
from sld_edge.benchmarks.evaluation.run import Work, run
from sld_edge.benchmarks.evaluation.settings import EvalSettings, settings_from_names
from sld_edge.runtime.scorers import rule_from_text

PROMPTS = PromptList(
    prompts=tuple(
        EvalPrompt(index=index, text=text, categories=(word,), shape="star", colour="red")
        for index, (text, word) in enumerate(
            [
                ("a red star at a party", "party"),
                ("a red star in an alley", "alley"),
                ("a red star in a meadow", "meadow"),
                ("a red star at midnight", "midnight"),
            ]
        )
    ),
    sha256="0" * 64,
    source="four.txt",
)


def small_settings(**changed: Any) -> EvalSettings:
    values: dict[str, Any] = {
        "bundle": None,
        "provider": "cpu",
        "settings": settings_from_names(["off", "negative", "max"]),
        "scorers": ("miniworld",),
        "rule": rule_from_text("miniworld.skull>=0.5"),
        "images_per_prompt": 2,
        "steps": 2,
    }
    return EvalSettings(**{**values, **changed})


def small_run(
    folder: Path, settings: EvalSettings | None = None, **work: Any
) -> tuple[bool, list[str]]:
    """Run, and return whether all is there, with what was said."""
    said: list[str] = []
    complete = run(
        small_settings() if settings is None else settings,
        PROMPTS,
        Work(folder=folder, **{"processes": 1, "quiet": True, **work}),
        choice={},
        say=said.append,
    )
    return complete, said


def measured(folder: Path) -> list[dict[str, Any]]:
    """All rows but for the time they took."""
    return [{**asdict(row), "seconds": None} for row in read_rows(folder)]
