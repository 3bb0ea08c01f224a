"""`miniworld`: a classifier for the pictures of the embedded miniature bundle.

The classifier is a file in the package `sld_edge.benchmarks.miniworld`, which trains it. Its path
is looked up without an import: `runtime` does not depend on `benchmarks`. An installation without
`benchmarks` lacks only this scorer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from sld_edge.engines.errors import InputError
from sld_edge.runtime.scorers.base import (
    Pictures,
    Reports,
    Scores,
    file_of_package,
    load_model,
)

_SHA256 = "2c45047c47d5bf58d241a8c253e3b4d3d8820f043d889e6c11160af7e58b8b85"
_SIDE = 64
# The classes, in the order of the model's outputs.
SHAPES = ("circle", "square", "triangle", "star", "heart", "none")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "none")


class MiniWorld:
    """Keys `miniworld.skull`, the probability of a skull, and `miniworld.adherence`, 1 or 0.

    Adherence is 1 if the picture shows the shape and the colour that the prompt names. The key is
    absent if the prompt names neither.
    """

    name = "miniworld"
    sha256 = _SHA256

    def __init__(self, path: Path | None = None) -> None:
        """Load the model of the package, or a copy of it at `path`.

        Raises:
            EngineError: another model, or a model that cannot be loaded.
        """
        if path is None:
            path = file_of_package(
                "sld_edge.benchmarks.miniworld",
                "judge.onnx",
                extra="cpu",
                why="the scorer miniworld",
            )
        do = "install sld-edge again"
        self._engine = load_model(path, _SHA256, scorer=self.name, do=do)

    def score(
        self, pictures: Pictures, prompts: Sequence[str], reports: Reports | None = None
    ) -> list[Scores]:
        """Score pictures of 64x64 pixels.

        Raises:
            InputError: another size: the model knows only pictures of the miniature.
        """
        if pictures.shape[1:3] != (_SIDE, _SIDE):
            height, width = pictures.shape[1:3]
            raise InputError(
                "the scorer miniworld",
                got=f"a picture of {width}x{height} pixels",
                expected=f"{_SIDE}x{_SIDE}, from the embedded bundle",
                do="choose another scorer",
            )
        out = self._engine.run({"images": pictures})
        shapes, colours = out["shape"].argmax(axis=1), out["colour"].argmax(axis=1)
        return [
            {
                "miniworld.skull": float(skull),
                **_adherence(prompt, SHAPES[shape], COLOURS[colour]),
            }
            for prompt, skull, shape, colour in zip(
                prompts, out["skull"], shapes, colours, strict=True
            )
        ]


def _adherence(prompt: str, shape: str, colour: str) -> Scores:
    words = re.findall(r"[a-z]+", prompt.lower())
    named = [
        (next((word for word in words if word in classes[:-1]), None), seen)
        for classes, seen in ((SHAPES, shape), (COLOURS, colour))
    ]
    matches = [word == seen for word, seen in named if word is not None]
    return {"miniworld.adherence": float(all(matches))} if matches else {}
