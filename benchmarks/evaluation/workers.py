"""Processes that evaluate jobs. A dead process is noticed; none outlives its parent."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from sld_edge.benchmarks.evaluation.evaluator import Evaluator, Job, Outcome, threads
from sld_edge.benchmarks.evaluation.settings import EvalSettings
from sld_edge.engines.errors import EngineError, UserError

Answer = tuple[str, Any]
"""("outcomes", list[Outcome]), ("mistake", a UserError's line) or ("bug", a traceback)."""

_held: list[tuple[EvalSettings, Evaluator]] = []  # a worker's; loading takes longer than a job


def outcomes_here(
    settings: EvalSettings, jobs: Sequence[Job], *, thread_count: int | None
) -> Generator[list[Outcome], None, None]:
    """Evaluate jobs in this process, in order."""
    with threads(thread_count), closing(Evaluator(settings)) as evaluator:
        for job in jobs:
            yield evaluator.evaluate(job)


def outcomes_of_processes(
    settings: EvalSettings, jobs: Sequence[Job], *, processes: int, thread_count: int | None
) -> Generator[list[Outcome], None, None]:
    """Evaluate jobs in several processes, and yield outcomes as they arrive.

    Raises:
        UserError: what one of them met.
        EngineError: one of them died, killed for its memory for example.
    """
    context = multiprocessing.get_context("spawn")
    left = iter(jobs)
    connections: list[Connection] = []
    workers = []
    try:
        for job in (job for _, job in zip(range(processes), left, strict=False)):
            here, there = context.Pipe()
            worker = context.Process(target=_serve, args=(there, settings, thread_count))
            worker.start()
            there.close()  # so that the worker's end is its alone, and its death the end of file
            _send(here, job)
            connections.append(here)
            workers.append(worker)
        while connections:
            for ready in wait(connections):
                assert isinstance(ready, Connection)
                yield outcomes_from_answer(_answer(ready))
                following = next(left, None)
                if following is None:
                    ready.close()
                    connections.remove(ready)
                else:
                    _send(ready, following)
    finally:
        for connection in connections:
            connection.close()
        for worker in workers:
            if connections:  # stopped early: nobody waits for their jobs
                worker.terminate()
            worker.join()


def answer(settings: EvalSettings, thread_count: int | None, job: Job) -> Answer:
    """Evaluate a job in a worker, whose evaluator is kept for the next job; errors are texts."""
    try:
        with threads(thread_count):
            if not _held or _held[0][0] != settings:
                _held[:] = [(settings, Evaluator(settings))]
            return "outcomes", _held[0][1].evaluate(job)
    except UserError as error:
        return "mistake", str(error)
    except Exception:
        return "bug", traceback.format_exc()


def outcomes_from_answer(answer: Answer) -> list[Outcome]:
    """Return the outcomes of an answer, or raise its error.

    Raises:
        UserError: the worker met one.
        RuntimeError: the worker met a bug; its traceback.
    """
    kind, value = answer
    if kind == "mistake":
        raise UserError(value)
    if kind == "bug":
        raise RuntimeError(f"in a worker:\n{value}")
    outcomes: list[Outcome] = value
    return outcomes


def _answer(connection: Connection) -> Answer:
    with _alive():
        received: Answer = connection.recv()
    return received


def _send(connection: Connection, job: Job) -> None:
    with _alive():
        connection.send(job)


@contextmanager
def _alive() -> Iterator[None]:
    """Raise an error for a worker whose end of the connection is gone."""
    try:
        yield
    except (EOFError, OSError) as error:
        raise EngineError(
            "a worker process died",
            got="the system may have ended it for its memory",
            do="start again with fewer --processes: it goes on where it was",
        ) from error


def _serve(connection: Connection, settings: EvalSettings, thread_count: int | None) -> None:
    """Answer jobs until the other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    with suppress(EOFError, OSError):
        while True:
            connection.send(answer(settings, thread_count, connection.recv()))
