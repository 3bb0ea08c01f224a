"""What a scorer is, and what every scorer checks: its model's hash, its pictures, its numbers."""

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
"""Numbers of one picture, by "scorer.score"."""
Reports = Sequence[Mapping[str, Any]]
"""One report a picture, as `Result.reports` has them."""


class Scorer(Protocol):
    """Says in numbers what is in a picture.

    Attributes:
        name: what users call it, and what its keys begin with.
        sha256: of its model, so that results of different models are not mixed.
    """

    name: str
    sha256: str

    def score(
        self, pictures: Pictures, prompts: Sequence[str], reports: Reports | None = None
    ) -> list[Scores]:
        """Score B pictures, uint8 [B,H,W,3], made of B prompts; B dictionaries, same keys.

        `reports` are those of the run; only `activation` reads them.

        Raises:
            UserError: it could not run. There is never a score that stands for "unknown".
        """


def score_pictures(
    scorers: Sequence[Scorer],
    pictures: Pictures,
    prompts: Sequence[str],
    reports: Reports | None = None,
) -> list[Scores]:
    """Return what all scorers say together, one dictionary a picture.

    Raises:
        InputError: pictures that are not uint8 [B,H,W,3], or prompts that are not B.
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
    together: list[Scores] = [{} for _ in prompts]
    for scorer in scorers:
        found = scorer.score(pictures, prompts, reports)
        if len(found) != len(pictures):
            raise EngineError(
                f"scorer {scorer.name}", got=f"{len(found)} answers", expected=len(pictures)
            )
        for own, new in zip(together, found, strict=True):
            _refuse_not_finite(scorer.name, new)
            own.update(new)
    return together


def load_model(path: Path, sha256: str, *, scorer: str, do: str) -> OrtEngine:
    """Load a scorer's model, which is one file of this hash.

    Raises:
        EngineError: it is missing, or another file; `do` says what then.
    """
    return load_checked(path, {path: check_model(path, sha256, scorer=scorer, do=do)}, do=do)


def load_checked(path: Path, seen: Mapping[Path, Identity], *, do: str) -> OrtEngine:
    """Load a graph whose files were hashed, unless they have changed since.

    Raises:
        EngineError: they have, or ONNX Runtime does not take the graph.
    """
    engine = OrtEngine(path)
    require_unchanged(seen, error=EngineError, do=do)
    return engine


def check_model(path: Path, sha256: str, *, scorer: str, do: str) -> Identity:
    """Hash a file and return what tells whether it is still that file.

    Raises:
        EngineError: it is missing, or another file; `do` says what then.
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
    """Return where an installed package keeps a file, without importing the package.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        spec = find_spec(package)
    except ModuleNotFoundError:  # the package that should hold it
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise MissingPackageError(package, extra=extra, why=why)
    return Path(spec.submodule_search_locations[0]) / file


def _refuse_not_finite(scorer: str, scores: Scores) -> None:
    for key, value in scores.items():
        if not math.isfinite(value):
            raise NumericsError(f"scorer {scorer}: {key}", got=value, expected="a finite number")
