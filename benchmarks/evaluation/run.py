"""A run: missing pictures of a results folder are made, scored and written one after another.

Only this process writes pictures and rows. A run that is killed at any moment goes on when it is
started again: it makes the pictures without a row on the disk.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sld_edge.benchmarks.evaluation.evaluator import (
    Job,
    Outcome,
    Task,
    request_from_tasks,
    threads,
)
from sld_edge.benchmarks.evaluation.manifest import claim_folder, run_manifest
from sld_edge.benchmarks.evaluation.prompts import EvalPrompt, PromptList
from sld_edge.benchmarks.evaluation.ray_run import outcomes_on_ray
from sld_edge.benchmarks.evaluation.rows import (
    Key,
    append_rows,
    drop_torn_line,
    locked_shard,
    not_written,
    read_rows,
)
from sld_edge.benchmarks.evaluation.settings import PLAIN, EvalSettings, loaded
from sld_edge.benchmarks.evaluation.workers import outcomes_here, outcomes_of_processes
from sld_edge.engines.errors import InputError
from sld_edge.engines.files import write_whole
from sld_edge.engines.providers import ON_HOST
from sld_edge.runtime.pipeline import Pipeline
from sld_edge.runtime.safety import empty_concept
from sld_edge.runtime.scorers import scorers_from_names

_SMALL_UNET = 64 << 20  # bytes; with a smaller UNet, one process a core is faster
_BATCH = 8  # pictures a job on a device; the pipeline splits it as its memory allows


@dataclass(frozen=True, kw_only=True)
class Work:
    """The part of a run that this process does, and its resources.

    Attributes:
        folder: of the results.
        shard: from 1 to `shards`.
        shards: number of parts that share the prompts.
        processes: None takes one a core for small models on the CPU, else one.
        ray: a Ray cluster's address, in place of processes.
        quiet: show no progress.
    """

    folder: Path
    shard: int = 1
    shards: int = 1
    processes: int | None = None
    ray: str | None = None
    quiet: bool = False


def run(
    settings: EvalSettings,
    prompts: PromptList,
    work: Work,
    *,
    choice: Mapping[str, Any],
    say: Callable[[str], None],
) -> bool:
    """Make the missing pictures of a shard; return whether the whole run is complete.

    Args:
        settings: how pictures are made and judged.
        prompts: the chosen prompts of all shards, with sizes that fit the bundle.
        work: this process's part.
        choice: how the prompts were chosen, for the manifest.
        say: gets each line for the user.

    Raises:
        UserError: the reason of a stop; started again, the run goes on.
    """
    _check(settings, work)
    with loaded(settings) as pipeline:
        settings = replace(settings, provider=pipeline.provider)
        # All scorers are loaded, so that each works here; the manifest holds their models' hashes.
        scorers = scorers_from_names(settings.scorers, settings.scorer_paths)
        hashes = {scorer.name: scorer.sha256 for scorer in scorers}
        _check_requests(pipeline, settings, prompts.prompts)
        manifest = run_manifest(settings, prompts, pipeline=pipeline, scorers=hashes, choice=choice)
        small = is_small(pipeline)
    claim_folder(work.folder, manifest)
    with locked_shard(work.folder, work.shard, work.shards) as rows:
        done = {row.key for row in read_rows(work.folder)}
        mine = prompts.prompts[work.shard - 1 :: work.shards]
        total = len(mine) * settings.images_per_prompt * len(settings.settings)
        jobs = jobs_from_prompts(mine, settings, done)
        missing = sum(len(task.missing) for job in jobs for task in job)
        if missing < total:
            say(f"{total - missing} of {total} pictures are there already")
        if jobs:
            outcomes = _outcomes(settings, jobs, work, small=small)
            _write(outcomes, rows, work, done=total - missing, of=total)
    everything = len(prompts.prompts) * settings.images_per_prompt * len(settings.settings)
    return len(read_rows(work.folder)) == everything


def jobs_from_prompts(
    prompts: Sequence[EvalPrompt], settings: EvalSettings, done: set[Key]
) -> list[Job]:
    """Return the missing pictures as jobs of one size each, in the prompts' order."""
    own_sizes = settings.protocol == "per-prompt"
    limit = settings.batch_size
    if limit is None:
        limit = 1 if settings.provider in ON_HOST else _BATCH
    by_size: dict[tuple[int | None, int | None], list[Task]] = {}
    for prompt in prompts:
        size = (prompt.width, prompt.height) if own_sizes else (None, None)
        for image in range(settings.images_per_prompt):
            missing = tuple(
                setting.name
                for setting in settings.settings
                if (setting.name, prompt.index, image) not in done
            )
            if missing:
                task = Task(prompt=prompt, image=image, missing=missing)
                by_size.setdefault(size, []).append(task)
    return [
        tuple(tasks[start : start + limit])
        for tasks in by_size.values()
        for start in range(0, len(tasks), limit)
    ]


def _outcomes(
    settings: EvalSettings, jobs: Sequence[Job], work: Work, *, small: bool
) -> Generator[list[Outcome], None, None]:
    cores = os.cpu_count() or 1
    on_cpu = settings.provider in ON_HOST
    processes = work.processes
    if processes is None:
        processes = cores if on_cpu and small else 1
    processes = min(processes, len(jobs))
    thread_count = 1 if on_cpu and small else None
    if on_cpu and not small and processes > 1:
        thread_count = max(1, cores // processes)
    with threads(thread_count):  # child processes inherit the number
        if work.ray is not None:
            yield from outcomes_on_ray(work.ray, settings, jobs, thread_count=thread_count)
        elif processes == 1:
            yield from outcomes_here(settings, jobs)
        else:
            yield from outcomes_of_processes(settings, jobs, processes)


def _write(
    outcomes: Generator[list[Outcome], None, None], rows: Path, work: Work, *, done: int, of: int
) -> None:
    bar = tqdm(
        total=of,
        initial=done,
        unit="picture",
        disable=work.quiet or None,
        file=sys.stderr,
        dynamic_ncols=True,
    )
    drop_torn_line(rows)
    with bar, closing(outcomes):  # closing ends the workers
        for made in outcomes:
            for outcome in made:
                _write_picture(work.folder, outcome.row.picture, outcome.png)
                _write_picture(work.folder, outcome.row.edit_map, outcome.edit_map)
            append_rows(rows, (outcome.row for outcome in made))
            bar.update(len(made))


def _write_picture(folder: Path, name: str | None, png: bytes | None) -> None:
    if name is None or png is None:
        return
    path = folder / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(path, error) from error
    write_whole(path, png)


def _check(settings: EvalSettings, work: Work) -> None:
    if not 1 <= work.shard <= work.shards:
        raise InputError(
            "--shard", got=f"{work.shard}/{work.shards}", expected="I/N, with I from 1 to N"
        )
    for name, value in (
        ("--processes", work.processes),
        ("--batch-size", settings.batch_size),
        ("--images-per-prompt", settings.images_per_prompt),
    ):
        if value is not None and value < 1:
            raise InputError(name, got=value, expected="1 or more")


def _check_requests(
    pipeline: Pipeline, settings: EvalSettings, prompts: Sequence[EvalPrompt]
) -> None:
    """Refuse wrong settings before any work is done."""
    names = [setting.name for setting in settings.settings]
    if names[:1] != [PLAIN.name] or len(set(names)) < len(names):
        raise InputError("settings", got=", ".join(names), expected="plain, and others, once each")
    for text in settings.concepts:  # also if it is only a negative prompt
        if pipeline.says_nothing(text):
            raise empty_concept(text)
    concept = pipeline.bundle.manifest.safety_concept
    firsts = {(prompt.width, prompt.height): prompt for prompt in prompts}
    for prompt in firsts.values():
        task = Task(prompt=prompt, image=0, missing=())
        for setting in settings.settings:
            pipeline.resolve(request_from_tasks(settings, setting, [task], concept))


def is_small(pipeline: Pipeline) -> bool:
    """Whether a bundle is so small that a process a core, of one thread each, is faster."""
    files = pipeline.bundle.manifest.components["unet"].files
    return sum(file.bytes for file in files) <= _SMALL_UNET
