"""Makes pictures of prompts with every setting, scores them, and returns rows."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sld_edge.benchmarks.evaluation.prompts import MAX_SEED, EvalPrompt
from sld_edge.benchmarks.evaluation.rows import Row
from sld_edge.benchmarks.evaluation.settings import (
    MINIATURE_SCORERS,
    PLAIN,
    EvalSettings,
    Setting,
    loaded,
)
from sld_edge.runtime.picture import blurred, grey_from_edit_map, png_from_image
from sld_edge.runtime.request import Request, Sampling, Savings
from sld_edge.runtime.scorers import (
    Scores,
    activation_scores,
    flagged,
    score_pictures,
    scorers_from_names,
)

_SEEDS_PER_PROMPT = 1000  # fixed, so that seeds do not depend on the number of pictures
_ADHERENCE = tuple(f"{name}.adherence" for name in MINIATURE_SCORERS)  # the first that is there


@dataclass(frozen=True, kw_only=True)
class Task:
    """Picture number `image` of a prompt, and the settings without a row of it."""

    prompt: EvalPrompt
    image: int
    missing: tuple[str, ...]


Job = tuple[Task, ...]
"""Tasks with pictures of one size, which are made together."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A row, with picture and edit map as PNGs; None where the run keeps none."""

    row: Row
    png: bytes | None
    edit_map: bytes | None


@dataclass(frozen=True, kw_only=True)
class _Made:
    image: Image.Image
    edit_map: NDArray[np.float32]  # [h,w]
    report: Mapping[str, Any]
    seconds: float

    @cached_property
    def pixels(self) -> NDArray[np.uint8]:
        return np.asarray(self.image)  # [H,W,3]


class Evaluator:
    """A loaded bundle and loaded scorers."""

    def __init__(self, settings: EvalSettings) -> None:
        """Load both.

        Raises:
            UserError: a file is missing or damaged.
        """
        self._settings = settings
        self._pipeline = loaded(settings)
        names = [name for name in settings.scorers if name != "activation"]  # of the run itself
        self._scorers = scorers_from_names(names, settings.scorer_paths)

    def evaluate(self, job: Job) -> list[Outcome]:
        """Make and score a job's missing pictures: plain first, the others with the same seeds.

        The plain picture is made even where its row exists: change is measured from it.

        Raises:
            UserError: a picture cannot be made, or a scorer cannot judge it.
        """
        plain = dict(zip(job, self._make(PLAIN, job), strict=True))
        outcomes = []
        for setting in self._settings.settings:
            tasks = [task for task in job if setting.name in task.missing]
            if not tasks:
                continue
            made = [plain[task] for task in tasks]
            made = made if setting == PLAIN else self._make(setting, tasks)
            outcomes += [
                self._outcome(setting, task, one, judged, plain[task].pixels)
                for task, one, judged in zip(tasks, made, self._judge(tasks, made), strict=True)
            ]
        return outcomes

    def score(
        self, setting: Setting, tasks: Sequence[Task], *, steps: int
    ) -> list[tuple[Scores, int]]:
        """Make and score pictures of one setting alone; return scores and UNet calls of each.

        Raises:
            UserError: as in `evaluate`.
        """
        made = self._make(setting, tasks, steps=steps)
        calls = [len(one.report["calls"]) for one in made]
        return list(zip(self._judge(tasks, made), calls, strict=True))

    def close(self) -> None:
        """Give back the bundle's graphs."""
        self._pipeline.close()

    def _make(
        self, setting: Setting, tasks: Sequence[Task], *, steps: int | None = None
    ) -> list[_Made]:
        concept = self._pipeline.bundle.manifest.safety_concept
        settings = self._settings if steps is None else replace(self._settings, steps=steps)
        run = self._pipeline.resolve(request_from_tasks(settings, setting, tasks, concept))
        begin = time.perf_counter()
        result = self._pipeline.run(run, batch_size=self._settings.batch_size)
        seconds = (time.perf_counter() - begin) / len(tasks)
        return [
            _Made(image=image, edit_map=edit_map, report=report, seconds=seconds)
            for image, edit_map, report in zip(
                result.images, result.edit_maps, result.reports, strict=True
            )
        ]

    def _judge(self, tasks: Sequence[Task], made: Sequence[_Made]) -> list[Scores]:
        pixels = np.stack([one.pixels for one in made])
        return score_pictures(self._scorers, pixels, [task.prompt.text for task in tasks])

    def _outcome(
        self,
        setting: Setting,
        task: Task,
        made: _Made,
        judged: Mapping[str, float],
        plain: NDArray[np.uint8],
    ) -> Outcome:
        calls, safety = made.report["calls"], made.report["safety"]
        share, strength = ([call[name] for call in calls] for name in ("share", "strength"))
        scores = {**activation_scores(share, strength), **judged}
        unsafe = flagged(scores, self._settings.rule)
        images, png, edit_map = self._settings.images, None, None
        if images != "discard":
            blur = images == "blur" and unsafe
            png = png_from_image(blurred(made.image) if blur else made.image, made.report)
        if images != "discard" and made.edit_map.any():
            edit_map = png_from_image(grey_from_edit_map(made.edit_map))
        place = _place(setting.name, task)
        shows = next((scores[key] for key in _ADHERENCE if key in scores), None)
        concepts = safety.get("concepts", [])
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
            picture=None if png is None else f"pictures/{place}",
            edit_map=None if edit_map is None else f"edit-maps/{place}",
            edit_map_max=round(float(made.edit_map.max()), 6),
            concepts=[entry["concept"] for entry in concepts],
            concept_strength=[entry["mean_strength"] for entry in concepts],
            strongest_concept=safety.get("strongest_concept"),
            branches=float(np.mean([call["branches"] for call in calls])),
        )
        return Outcome(row=row, png=png, edit_map=edit_map)


def request_from_tasks(
    settings: EvalSettings, setting: Setting, tasks: Sequence[Task], concept: str
) -> Request:
    """Return the pipeline's request for tasks of one size; `concept` is the bundle's.

    The setting "negative prompt" has all concepts and the prompt's own negative prompt, joined by
    commas.
    """
    of_list = settings.protocol == "per-prompt"
    scales = [task.prompt.guidance_scale if of_list else None for task in tasks]
    against = (settings.concepts or (concept,)) if setting.negative_prompt else ()
    own = [task.prompt.negative_prompt for task in tasks]
    negative = [(*against, text) if text is not None else against for text in own]
    return Request(
        prompts=tuple(task.prompt.text for task in tasks),
        negative_prompt=[", ".join(texts) if texts else None for texts in negative],
        safety=setting.safety,
        safety_concept=(settings.concepts or None) if setting.uses_concept else None,
        text_filter=(settings.text_filter or None) if setting.filters else None,
        guidance_scale=[settings.guidance_scale if x is None else x for x in scales],
        sampling=Sampling(steps=settings.steps, sampler=settings.sampler),
        savings=Savings(cache_interval=settings.cache_interval),
        seed=[seed_of(settings, task) for task in tasks],
        width=tasks[0].prompt.width if of_list else None,
        height=tasks[0].prompt.height if of_list else None,
    )


def seed_of(settings: EvalSettings, task: Task) -> int:
    """Return a picture's seed: the list's with the protocol per-prompt, or the run's."""
    seed = task.prompt.seed if settings.protocol == "per-prompt" else None
    if seed is None:
        seed = settings.first_seed + task.prompt.index * _SEEDS_PER_PROMPT
    return (seed + task.image) % (MAX_SEED + 1)


def _place(setting: str, task: Task) -> str:
    """Return a picture's place in its folder, a name that every file system takes."""
    words = re.sub(r"[^a-z0-9.+=-]+", "-", setting.lower().replace(",", "_")).strip("-.")
    return f"{words}/{task.prompt.index:05d}-{task.image:03d}.png"


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Set `count` threads for engines loaded in the block, unless the user has set a number.

    None sets no number. With one thread a job gives the same bits on every machine, and small
    models are faster.
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
