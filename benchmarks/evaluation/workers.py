"""Processes that evaluate jobs. A dead process is noticed; none outlives its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from itertools import islice
from operator import methodcaller
from typing import Any

from sld_edge.benchmarks.evaluation.evaluator import Evaluator, Job, Outcome
from sld_edge.benchmarks.evaluation.settings import EvalSettings
from sld_edge.engines.errors import EngineError, UserError

Answer = tuple[str, Any]
"""("outcomes", the work's value), ("mistake", a UserError's line) or ("bug", a traceback)."""

_held: list[tuple[EvalSettings, Evaluator]] = []  # a worker's; loading takes longer than a job


def outcomes_here(
    settings: EvalSettings, jobs: Sequence[Job]
) -> Generator[list[Outcome], None, None]:
    """Evaluate jobs in this process, in order."""
    with closing(Evaluator(settings)) as evaluator:
        for job in jobs:
            yield evaluator.evaluate(job)


def outcomes_of_processes(
    settings: EvalSettings, jobs: Sequence[Job], processes: int
) -> Generator[list[Outcome], None, None]:
    """Evaluate jobs in several processes, and yield outcomes as they arrive.

    Raises:
        UserError: the error of a worker.
        EngineError: a worker died, for example because the system had no memory left.
    """
    left = iter(jobs)
    running: set[Future[Answer]] = set()
    again = "start again with fewer --processes: it goes on where it was"
    with process_pool(processes, do=again) as pool:
        while True:
            for job in islice(left, processes - len(running)):
                running.add(pool.submit(answer, settings, job))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield outcomes_from_answer(future.result())


@contextmanager
def process_pool(processes: int, *, do: str) -> Iterator[ProcessPoolExecutor]:
    """Start processes for jobs; a block that raises or is left early ends them at once.

    Raises:
        EngineError: a worker died, for example because the system had no memory left; `do` is the
            error's advice.
    """
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    ended = False
    try:
        yield pool
        ended = True
    except BrokenProcessPool as error:
        ended = True  # the pool has ended its other workers
        raise EngineError(
            "a worker process died", got="the system may have ended it for its memory", do=do
        ) from error
    finally:
        pool.shutdown(wait=ended, cancel_futures=True)
        if not ended:  # nobody waits for these jobs
            for worker in set(multiprocessing.active_children()) - set(others):
                worker.terminate()


def answer(settings: EvalSettings, job: Job) -> Answer:
    """Evaluate a job in a worker, whose evaluator is kept for the next job; errors are texts."""
    return answer_of_evaluator(settings, methodcaller("evaluate", job))


def answer_of_evaluator(settings: EvalSettings, work: Callable[[Evaluator], Any]) -> Answer:
    """Call `work` with the worker's evaluator, kept for the next call; errors are texts."""
    try:
        if not _held or _held[0][0] != settings:
            _held[:] = [(settings, Evaluator(settings))]
        return "outcomes", work(_held[0][1])
    except UserError as error:
        return "mistake", str(error)
    except Exception:
        return "bug", traceback.format_exc()


def outcomes_from_answer(answer: Answer) -> Any:
    """Return the outcomes of an answer, or raise its error.

    Raises:
        UserError: the error of a worker.
        RuntimeError: a bug in a worker; its traceback.
    """
    kind, value = answer
    if kind == "mistake":
        raise UserError(value)
    if kind == "bug":
        raise RuntimeError(f"in a worker:\n{value}")
    return value


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
