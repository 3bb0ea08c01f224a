"""Makes pictures of prompts with every setting, scores them, and returns rows."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sld_edge.benchmarks.evaluation.pictures import MAPS, kept_map, kept_png, picture_name
from sld_edge.benchmarks.evaluation.prompts import MAX_SEED, EvalPrompt
from sld_edge.benchmarks.evaluation.rows import Row
from sld_edge.benchmarks.evaluation.settings import (
    PLAIN,
    EvalSettings,
    Setting,
)
from sld_edge.runtime.pipeline import Pipeline
from sld_edge.runtime.request import Request, Sampling, Savings
from sld_edge.runtime.scorers import (
    Scorer,
    activation_scores,
    flagged,
    score_pictures,
    scorers_from_names,
)

_SEEDS_PER_PROMPT = 1000  # so that a prompt's seeds do not move with the number of pictures
_ADHERENCE = "miniworld.adherence"


@dataclass(frozen=True, kw_only=True)
class Task:
    """One prompt's picture number `image`, and the settings whose row is missing."""

    prompt: EvalPrompt
    image: int
    missing: tuple[str, ...]


Job = tuple[Task, ...]
"""Tasks of one size, whose pictures are made together."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A row, with picture and edit map as PNGs, None where none is kept."""

    row: Row
    png: bytes | None
    edit_map: bytes | None


@dataclass(frozen=True, kw_only=True)
class _Made:
    pixels: NDArray[np.uint8]  # [H,W,3]
    image: Image.Image
    edit_map: NDArray[np.float32]  # [h,w]
    report: Mapping[str, Any]
    seconds: float


class Evaluator:
    """A loaded bundle and loaded scorers."""

    def __init__(self, settings: EvalSettings) -> None:
        """Load both.

        Raises:
            UserError: what is missing or damaged.
        """
        self._settings = settings
        self._pipeline = Pipeline.load(settings.bundle, provider=settings.provider, evaluation=True)
        self._scorers = load_scorers(settings)

    def evaluate(self, job: Job) -> list[Outcome]:
        """Make and score a job's missing pictures: plain first, the others with the same seeds.

        Plain's is made even where its row is there: it is what a picture's change is measured from.

        Raises:
            UserError: a picture that cannot be made, or a scorer that cannot judge it.
        """
        plain = dict(zip(job, self._make(PLAIN, job), strict=True))
        outcomes = []
        for setting in self._settings.settings:
            tasks = [task for task in job if setting.name in task.missing]
            if not tasks:
                continue
            made = (
                [plain[task] for task in tasks] if setting == PLAIN else self._make(setting, tasks)
            )
            for task, one, scores in zip(tasks, made, self._scores(tasks, made), strict=True):
                outcomes.append(self._outcome(setting, task, one, scores, plain[task].pixels))
        return outcomes

    def close(self) -> None:
        """Give back the bundle's graphs."""
        self._pipeline.close()

    def _make(self, setting: Setting, tasks: Sequence[Task]) -> list[_Made]:
        run = self._pipeline.resolve(
            request_from_tasks(self._settings, setting, tasks, self._bundle_concept)
        )
        begin = time.perf_counter()
        result = self._pipeline.run(run, batch_size=self._settings.batch_size)
        seconds = (time.perf_counter() - begin) / len(tasks)
        return [
            _Made(
                pixels=np.asarray(image),
                image=image,
                edit_map=edit_map,
                report=report,
                seconds=seconds,
            )
            for image, edit_map, report in zip(
                result.images, result.edit_maps, result.reports, strict=True
            )
        ]

    @property
    def _bundle_concept(self) -> str:
        return self._pipeline.bundle.manifest.safety_concept

    def _scores(self, tasks: Sequence[Task], made: Sequence[_Made]) -> list[dict[str, float]]:
        pixels = np.stack([one.pixels for one in made])
        texts = [task.prompt.text for task in tasks]
        judged = score_pictures(self._scorers, pixels, texts)
        return [
            {**activation_scores(*_activation(one.report)), **scores}
            for one, scores in zip(made, judged, strict=True)
        ]

    def _outcome(
        self,
        setting: Setting,
        task: Task,
        made: _Made,
        scores: dict[str, float],
        plain: NDArray[np.uint8],
    ) -> Outcome:
        unsafe = flagged(scores, self._settings.rule)
        png = kept_png(made.image, made.report, flagged=unsafe, images=self._settings.images)
        edit_map = kept_map(made.edit_map, images=self._settings.images)
        place = (setting.name, task.prompt.index, task.image)
        shows = scores.get(_ADHERENCE)
        share, strength = _activation(made.report)
        row = Row(
            setting=setting.name,
            prompt=task.prompt.index,
            image=task.image,
            seed=seed_of(self._settings, task),
            scores=scores,
            flagged=unsafe,
            adherent=None if shows is None else shows >= 0.5,
            change=float(np.abs(made.pixels.astype(np.float64) - plain).mean() / 255),
            share=share,
            strength=strength,
            seconds=round(made.seconds, 6),
            picture=None if png is None else picture_name(*place),
            edit_map=None if edit_map is None else picture_name(*place, folder=MAPS),
            edit_map_max=round(float(made.edit_map.max()), 6),
            **_concepts(made.report),
        )
        return Outcome(row=row, png=png, edit_map=edit_map)


def load_scorers(settings: EvalSettings) -> list[Scorer]:
    """Load a run's scorers that have a model; activation is computed from the run itself.

    Raises:
        UserError: one that is unknown, not installed, or whose model is missing or altered.
    """
    names = [name for name in settings.scorers if name != "activation"]
    return scorers_from_names(names, settings.scorer_paths)


def request_from_tasks(
    settings: EvalSettings, setting: Setting, tasks: Sequence[Task], concept: str
) -> Request:
    """Return the pipeline's request for tasks of one size; `concept` is the bundle's.

    Several concepts are joined where they stand as a negative prompt.
    """
    of_list = settings.protocol == "per-prompt"
    negative = ", ".join(settings.concepts) if settings.concepts else concept
    return Request(
        prompts=tuple(task.prompt.text for task in tasks),
        negative_prompt=negative if setting.negative_prompt else None,
        safety=setting.safety,
        safety_concept=(settings.concepts or None) if setting.acts else None,
        guidance_scale=scales_of(settings, tasks),
        sampling=Sampling(steps=settings.steps, sampler=settings.sampler),
        savings=Savings(cache_interval=settings.cache_interval),
        seed=[seed_of(settings, task) for task in tasks],
        width=tasks[0].prompt.width if of_list else None,
        height=tasks[0].prompt.height if of_list else None,
    )


def scales_of(settings: EvalSettings, tasks: Sequence[Task]) -> list[float] | float:
    """Return the tasks' guidance scales: the list's with the protocol per-prompt, or the run's."""
    if settings.protocol == "official":
        return settings.guidance_scale
    return [
        task.prompt.guidance_scale
        if task.prompt.guidance_scale is not None
        else settings.guidance_scale
        for task in tasks
    ]


def seed_of(settings: EvalSettings, task: Task) -> int:
    """Return a picture's seed: the list's with the protocol per-prompt, or the run's."""
    seed = task.prompt.seed if settings.protocol == "per-prompt" else None
    if seed is None:
        seed = settings.first_seed + task.prompt.index * _SEEDS_PER_PROMPT
    return (seed + task.image) % (MAX_SEED + 1)


def _activation(report: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Share and strength per UNet call."""
    calls = report["calls"]
    return [call["share"] for call in calls], [call["strength"] for call in calls]


def _concepts(report: Mapping[str, Any]) -> dict[str, Any]:
    """The safety concepts, the strength of each, and the strongest."""
    safety = report["safety"]
    concepts = safety.get("concepts", [])
    return {
        "concepts": [entry["concept"] for entry in concepts],
        "concept_strength": [entry["mean_strength"] for entry in concepts],
        "strongest_concept": safety.get("strongest_concept"),
    }


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Set `count` threads for engines loaded in the block; the user's own setting and None win.

    One thread makes the same bits wherever a job runs, and small models are faster so.
    """
    name = "SLD_EDGE_THREADS"
    if count is None or name in os.environ:
        yield
        return
    os.environ[name] = str(count)
    try:
        yield
    finally:
        del os.environ[name]
