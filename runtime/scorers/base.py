"""The interface of a scorer, and the checks of every scorer: model, pictures and scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sld_edge.engines.errors import EngineError, InputError, MissingPackageError, NumericsError
from sld_edge.engines.files import Identity, require_unchanged, sha256_of_file
from sld_edge.engines.onnxruntime.engine import OrtEngine

Pictures = NDArray[np.uint8]
"""uint8 [B,H,W,3], RGB."""
Scores = dict[str, float]
"""The scores of a picture, by key "scorer.score"."""
Reports = Sequence[Mapping[str, Any]]
"""A report for each picture, as in `Result.reports`."""


class Scorer(Protocol):
    """Scores pictures.

    Attributes:
        name: the scorer's name, with which its keys begin.
        sha256: SHA-256 of its model, so that results of different models are not mixed.
    """

    name: str
    sha256: str

    def score(
        self, pictures: Pictures, prompts: Sequence[str], reports: Reports | None = None
    ) -> list[Scores]:
        """Score B pictures, uint8 [B,H,W,3], of B prompts; return B dictionaries.

        `reports` are the reports of the run; only `activation` reads them.

        Raises:
            UserError: the scorer could not run. No score stands for "unknown".
        """


def score_pictures(
    scorers: Sequence[Scorer],
    pictures: Pictures,
    prompts: Sequence[str],
    reports: Reports | None = None,
) -> list[Scores]:
    """Return the scores of all scorers, a dictionary for each picture.

    Raises:
        InputError: pictures that are not uint8 [B,H,W,3], or not B prompts.
        NumericsError: a score that is not finite.
        UserError: a scorer that could not run.
    """
    shape = np.shape(pictures)
    if len(shape) != 4 or shape[3] != 3 or 0 in shape or pictures.dtype != np.uint8:
        raise InputError(
            "pictures to score", got=f"{pictures.dtype} {list(shape)}", expected="uint8 [B,H,W,3]"
        )
    if len(prompts) != len(pictures):
        raise InputError("prompts to score", got=len(prompts), expected=len(pictures))
    all_scores: list[Scores] = [{} for _ in prompts]
    for scorer in scorers:
        answers = scorer.score(pictures, prompts, reports)
        if len(answers) != len(pictures):
            raise EngineError(
                f"scorer {scorer.name}", got=f"{len(answers)} answers", expected=len(pictures)
            )
        for scores, answer in zip(all_scores, answers, strict=True):
            _refuse_not_finite(scorer.name, answer)
            scores.update(answer)
    return all_scores


def load_model(path: Path, sha256: str, *, scorer: str, do: str) -> OrtEngine:
    """Load a scorer's model, a single file with this hash.

    Raises:
        EngineError: the file is missing or has another hash; `do` is the advice in the error.
    """
    return load_checked(path, {path: check_model(path, sha256, scorer=scorer, do=do)}, do=do)


def load_checked(path: Path, seen: Mapping[Path, Identity], *, do: str) -> OrtEngine:
    """Load a graph whose files were hashed; `seen` has their identities at that time.

    Raises:
        EngineError: a file has changed since, or ONNX Runtime refuses the graph.
    """
    engine = OrtEngine(path)
    require_unchanged(seen, error=EngineError, do=do)
    return engine


def check_model(path: Path, sha256: str, *, scorer: str, do: str) -> Identity:
    """Check the hash of a file; return its identity, which changes if the file is changed.

    Raises:
        EngineError: the file is missing or has another hash; `do` is the advice in the error.
    """
    try:
        digest, seen = sha256_of_file(path)
    except OSError as error:
        raise EngineError(
            f"scorer {scorer}: cannot read {path}", got=error.strerror, do=do
        ) from error
    if digest != sha256:
        raise EngineError(
            f"scorer {scorer}: {path} is another model",
            got=f"SHA-256 {digest[:12]}…",
            expected=f"{sha256[:12]}…",
            do=do,
        )
    return seen


def file_of_package(package: str, file: str, *, extra: str, why: str) -> Path:
    """Return the path of a file of an installed package, without importing the package.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        spec = find_spec(package)
    except ModuleNotFoundError:  # the parent package is missing
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(package, extra=extra, why=why)
    return Path(spec.submodule_search_locations[0]) / file


def _refuse_not_finite(scorer: str, scores: Scores) -> None:
    for key, value in scores.items():
        if not math.isfinite(value):
            raise NumericsError(f"scorer {scorer}: {key}", got=value, expected="a finite number")
