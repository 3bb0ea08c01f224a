"""The same jobs on a Ray cluster; only the driver writes files.

Every machine needs sld-edge and the bundle at the same path. If a worker dies, another does its job
again. Rows and pictures come back to the driver, so the machines share no folder.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from typing import Any

from sld_edge.benchmarks.evaluation.evaluator import Job, Outcome, threads
from sld_edge.benchmarks.evaluation.settings import EvalSettings
from sld_edge.benchmarks.evaluation.workers import Answer, answer, outcomes_from_answer
from sld_edge.engines.errors import EngineError, MissingPackageError, one_line
from sld_edge.engines.providers import ON_HOST

_RETRIES = 5  # of a job whose worker died
_AHEAD = 2  # jobs handed out per CPU or GPU


def outcomes_on_ray(
    address: str, settings: EvalSettings, jobs: Sequence[Job], *, thread_count: int | None
) -> Generator[list[Outcome], None, None]:
    """Evaluate jobs on the cluster at `address` ("auto" finds it, "local" starts one here).

    Raises:
        MissingPackageError: no ray.
        EngineError: the cluster cannot be reached, or a job's workers kept dying.
        UserError: the error of a worker.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingPackageError("ray", extra="ray", why="--ray") from error
    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except Exception as error:  # Ray's errors here share no base class
            raise EngineError(
                f"no Ray cluster at {address}",
                got=one_line(error),
                do="start one with `ray start --head`, or use --ray local",
            ) from error
    try:
        yield from _outcomes(ray, settings, jobs, thread_count)
    finally:
        if ours:
            ray.shutdown()


def _outcomes(
    ray: Any, settings: EvalSettings, jobs: Sequence[Job], thread_count: int | None
) -> Generator[list[Outcome], None, None]:
    on_gpu = settings.provider not in ON_HOST
    resources = {"num_gpus": 1} if on_gpu else {"num_cpus": thread_count or 1}
    total = ray.cluster_resources().get("GPU" if on_gpu else "CPU", 0)
    if total < max(resources.values()):
        raise EngineError(
            "the Ray cluster cannot run a job", got=f"{total:g} in all", expected=str(resources)
        )
    remote = ray.remote(max_retries=_RETRIES, **resources)(evaluate_on_worker)
    shared = ray.put((settings, thread_count))
    window = max(1, int(total / max(resources.values()))) * _AHEAD
    left = iter(jobs)
    running: set[Any] = set()
    while True:
        for job in (job for _, job in zip(range(window - len(running)), left, strict=False)):
            running.add(remote.remote(shared, job))
        if not running:
            return
        done, _ = ray.wait(list(running), num_returns=1)
        running -= set(done)
        try:
            answered = ray.get(done[0])
        except ray.exceptions.RayError as error:
            raise EngineError(
                "a job could not be done on the Ray cluster",
                got=one_line(error),
                do="start again: it goes on where it was",
            ) from error
        yield outcomes_from_answer(answered)


def evaluate_on_worker(shared: tuple[EvalSettings, int | None], job: Job) -> Answer:
    """Answer a job on a machine of the cluster."""
    settings, thread_count = shared
    os.environ.pop("OMP_NUM_THREADS", None)  # Ray sets it; ours are counted by SLD_EDGE_THREADS
    with threads(thread_count):
        return answer(settings, job)
