"""What the experiments on the miniature world share: seeds, the judge, and a log that goes on."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from sld_edge.benchmarks.evaluation.statistics import wilson
from sld_edge.engines.errors import InputError

JUDGE: Final = Path(__file__).parent / "judge.onnx"
PROMPT_SEED: Final = 20_260
FIRST_SEED: Final = 500_000  # of the pictures; calibration used seeds from 1,000,000

Answer = TypeVar("Answer")  # a dataclass of what JSON has
Job = TypeVar("Job")


def answers_from_log(log: Path, kind: Callable[..., Answer]) -> list[Answer]:
    """Read what was answered so far; nothing where there is no log.

    Raises:
        InputError: a line that is no answer.
    """
    found = []
    for number, line in enumerate(log.read_text().splitlines() if log.exists() else (), 1):
        try:
            found.append(kind(**json.loads(line)))
        except (ValueError, TypeError) as error:
            do = "remove the line, or choose another --output"
            raise InputError(f"line {number} of {log}", got=line[:60], do=do) from error
    return found


def answer_jobs(
    work: Callable[[Job], Sequence[Any]], jobs: Sequence[Job], log: Path, processes: int
) -> None:
    """Do jobs in several processes; the answers are appended to the log as they come."""
    log.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, _take_one_thread) as pool, log.open("a") as stream:
        for answers in tqdm(pool.imap_unordered(work, jobs), total=len(jobs), unit="job"):
            stream.write("".join(json.dumps(asdict(answer)) + "\n" for answer in answers))
            stream.flush()


def _take_one_thread() -> None:
    """One process a core is faster on so small a model; the caller keeps its own setting."""
    os.environ["SLD_EDGE_THREADS"] = "1"


def share(hits: Sequence[bool]) -> str:
    """Return a share with its 95 % interval (Wilson)."""
    low, high = wilson(sum(hits), len(hits))
    return f"{sum(hits) / len(hits):.1%} ({low:.1%} to {high:.1%})"


def psnr(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> float:
    """Return the peak signal-to-noise ratio of two pictures in dB; infinite if they are equal."""
    error = float(np.mean((ours.astype(np.float64) - theirs) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf
