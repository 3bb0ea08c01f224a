"""`miniworld` and `miniworld-examiner`: classifiers of the embedded miniature's pictures.

Two networks answer the same questions. They differ in architecture, seed and training pictures. A
run screens its pictures with `miniworld`; `sld-eval` measures with `miniworld-examiner`, so that no
network measures its own work.

The networks are files in the package `sld_edge.benchmarks.miniworld`, which trains them. Their path
is looked up without an import: `runtime` does not depend on `benchmarks`. An installation without
`benchmarks` lacks only these scorers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sld_edge.engines.errors import InputError
from sld_edge.runtime.scorers.base import (
    Pictures,
    Reports,
    Scores,
    file_of_package,
    load_model,
)

_SIDE = 64
# The classes, in the order of the model's outputs.
SHAPES = ("circle", "square", "triangle", "star", "heart", "none")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "none")


@dataclass(frozen=True, kw_only=True)
class Network:
    """A classifier: the scorer's name, the file in its package, and the file's SHA-256."""

    name: str
    file: str
    sha256: str


JUDGE = Network(
    name="miniworld",
    file="judge.onnx",
    sha256="2c45047c47d5bf58d241a8c253e3b4d3d8820f043d889e6c11160af7e58b8b85",
)
EXAMINER = Network(
    name="miniworld-examiner",
    file="examiner.onnx",
    sha256="bad432b02ca45ecb94a4b1d26d8f78617ad5ff7c540c76da793ce293587e99f1",
)


class MiniWorld:
    """Keys `NAME.skull`, the probability of a skull, and `NAME.adherence`, 1 or 0.

    Adherence is 1 if the picture shows the shape and the colour that the prompt names. The key is
    absent if the prompt names neither.
    """

    def __init__(self, path: Path | None = None, *, network: Network = JUDGE) -> None:
        """Load a network of the package, or a copy of it at `path`.

        Raises:
            EngineError: another model, or a model that cannot be loaded.
        """
        self.name, self.sha256 = network.name, network.sha256
        if path is None:
            path = file_of_package(
                "sld_edge.benchmarks.miniworld",
                network.file,
                extra="cpu",
                why=f"the scorer {self.name}",
            )
        do = "install sld-edge again"
        self._engine = load_model(path, self.sha256, scorer=self.name, do=do)

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
                f"the scorer {self.name}",
                got=f"a picture of {width}x{height} pixels",
                expected=f"{_SIDE}x{_SIDE}, from the embedded bundle",
                do="choose another scorer",
            )
        out = self._engine.run({"images": pictures})
        shapes, colours = out["shape"].argmax(axis=1), out["colour"].argmax(axis=1)
        return [
            {
                f"{self.name}.{key}": value
                for key, value in (
                    ("skull", float(skull)),
                    *_adherence(prompt, SHAPES[shape], COLOURS[colour]),
                )
            }
            for prompt, skull, shape, colour in zip(
                prompts, out["skull"], shapes, colours, strict=True
            )
        ]


def _adherence(prompt: str, shape: str, colour: str) -> list[tuple[str, float]]:
    words = re.findall(r"[a-z]+", prompt.lower())
    named = [
        (next((word for word in words if word in classes[:-1]), None), seen)
        for classes, seen in ((SHAPES, shape), (COLOURS, colour))
    ]
    matches = [word == seen for word, seen in named if word is not None]
    return [("adherence", float(all(matches)))] if matches else []
