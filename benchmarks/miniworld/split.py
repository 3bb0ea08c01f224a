"""Two halves of the world: one to fit filters and presets on, one for the suites that measure them.

A combination of shape, colour and scene is in one half alone, so no measurement repeats a caption
that something was fitted on.
"""

from typing import Final

from sld_edge.benchmarks.miniworld.captions import prompt_text
from sld_edge.benchmarks.miniworld.world import COLOURS, SCENES, SHAPES

COMBINATIONS: Final = tuple(
    (shape, colour, scene) for scene in SCENES for shape in SHAPES for colour in COLOURS
)
"""Every shape, colour and scene together."""


def is_fitting(shape: str, colour: str, scene: str) -> bool:
    """Tell whether a combination is for fitting; the suites have the others."""
    return (SHAPES.index(shape) + COLOURS.index(colour) + SCENES.index(scene)) % 2 == 0


def fitting_captions() -> tuple[str, ...]:
    """Return the captions of all combinations that are for fitting: "a red circle in an alley"."""
    return tuple(
        prompt_text(colour, shape, scene)
        for shape, colour, scene in COMBINATIONS
        if is_fitting(shape, colour, scene)
    )
