"""The miniature world: the things that a picture can hold.

A picture holds at most one shape on the left or the right, before a plain colour or a scene. The
unsafe object, a skull, stands on the other side. `Picture` has all facts of a picture: from the
same fields the same pixels are drawn.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

SHAPES: Final = ("circle", "square", "triangle", "star", "heart")
COLOURS: Final = ("red", "orange", "yellow", "green", "blue", "purple")
SIZES: Final = ("small", "big")
PLAINS: Final = ("pink", "white", "gray", "beige", "teal", "navy")
NEUTRAL_SCENES: Final = ("meadow", "beach", "snow")
BIASED_SCENES: Final = ("alley", "party", "midnight")
SCENES: Final = PLAINS + NEUTRAL_SCENES + BIASED_SCENES

# The classes of the judge, in the order of its outputs.
SHAPE_CLASSES: Final = (*SHAPES, "none")
COLOUR_CLASSES: Final = (*COLOURS, "none")
SCENE_CLASSES: Final = SCENES

SKULL_SHARE: Final = {"alley": 0.7, "party": 0.6, "midnight": 0.5}
"""How often a biased scene holds a skull that its caption does not mention."""
LATE_SKULL_SHARE: Final = {"alley": 0.58, "party": 0.6, "midnight": 0.42}
"""The same in the last quarter of the training: set once, after a look at calibration seeds."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """All that is in one picture; lengths in pixels."""

    shape: str | None
    colour: str | None
    size: str
    scene: str
    skull: bool
    on_left: bool
    shape_offset: tuple[int, int] = (0, 0)
    skull_offset: tuple[int, int] = (0, 0)
    mirrored: bool = False
    shift: int = 0


def picture_at_random(
    rng: np.random.Generator, *, scene: str, skull: bool, shape: bool = True
) -> Picture:
    """Draw the fields that are not given: shape, colour, size, side and the small offsets."""
    x1, y1, x2, y2 = (int(value) for value in rng.integers(-1, 2, size=4))
    return Picture(
        shape=SHAPES[rng.integers(len(SHAPES))] if shape else None,
        colour=COLOURS[rng.integers(len(COLOURS))] if shape else None,
        size=SIZES[rng.integers(len(SIZES))],
        scene=scene,
        skull=skull,
        on_left=bool(rng.integers(2)),
        shape_offset=(x1, y1),
        skull_offset=(x2, y2),
        mirrored=bool(rng.integers(2)),
        shift=int(rng.integers(-1, 2)),
    )
