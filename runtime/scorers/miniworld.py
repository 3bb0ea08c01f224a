"""`miniworld`: the judge of the miniature world, for the embedded bundle's pictures.

The judge lies where it was trained, in `sld_edge.benchmarks.miniworld`. It is found by that name
when asked for, not imported: nothing in `runtime` depends on `benchmarks`, and an installation
without it lacks this scorer only.
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
# The judge's classes, in the order of its outputs.
SHAPES = ("circle", "square", "triangle", "star", "heart", "none")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "none")


class MiniWorld:
    """Key `miniworld.skull`, the probability of a skull; `miniworld.adherence`, 1 or 0.

    Adherence is whether the picture shows the shape and the colour that the prompt names; a prompt
    that names neither has no such key.
    """

    name = "miniworld"
    sha256 = _SHA256

    def __init__(self, path: Path | None = None) -> None:
        """Load the judge that ships, or a copy of it at `path`.

        Raises:
            EngineError: another model, or one that cannot be loaded.
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
            InputError: another size: the judge knows the miniature world only.
        """
        if pictures.shape[1:3] != (_SIDE, _SIDE):
            height, width = pictures.shape[1:3]
            raise InputError(
                "the scorer miniworld",
                got=f"a picture of {width}x{height} pixels",
                expected=f"{_SIDE}x{_SIDE}, of the embedded bundle",
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
    asked = [
        (next((word for word in words if word in known[:-1]), None), seen)
        for known, seen in ((SHAPES, shape), (COLOURS, colour))
    ]
    named = [(want, seen) for want, seen in asked if want is not None]
    if not named:
        return {}
    return {"miniworld.adherence": float(all(want == seen for want, seen in named))}
