"""Supersampled drawing with PIL in units of final pixels."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIZE: Final = 64
SCALE: Final = 4

Point = tuple[float, float]


def blank(colour: str) -> Image.Image:
    """Return an image of one colour at drawing resolution."""
    return Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), colour)


def pixels_from_canvas(image: Image.Image) -> NDArray[np.uint8]:
    """Reduce a drawing to [64,64,3] by the mean of every block."""
    return np.asarray(image.reduce(SCALE), dtype=np.uint8)


def polygon(image: Image.Image, points: Sequence[Point], colour: str) -> None:
    """Fill a polygon."""
    ImageDraw.Draw(image).polygon([(x * SCALE, y * SCALE) for x, y in points], fill=colour)


def stroke(image: Image.Image, points: Sequence[Point], width: float, colour: str) -> None:
    """Draw a closed outline with round corners, `width` pixels wide in all."""
    draw = ImageDraw.Draw(image)
    path = [(x * SCALE, y * SCALE) for x, y in (*points, points[0])]
    draw.line(path, fill=colour, width=round(width * SCALE))
    radius = width * SCALE / 2
    for x, y in path:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)


def ellipse(image: Image.Image, x: float, y: float, rx: float, ry: float, colour: str) -> None:
    """Fill an ellipse given by its centre and radii."""
    ImageDraw.Draw(image).ellipse(_box(x, y, rx, ry), fill=colour)


def rectangle(
    image: Image.Image,
    box: tuple[float, float, float, float],
    colour: str,
    radius: float = 0.0,
) -> None:
    """Fill a rectangle (left, top, right, bottom), its corners rounded by `radius`."""
    left, top, right, bottom = (round(value * SCALE) for value in box)
    ImageDraw.Draw(image).rounded_rectangle(
        (left, top, right - 1, bottom - 1), radius=radius * SCALE, fill=colour
    )


def shade(image: Image.Image, x: float, y: float, rx: float, ry: float, opacity: float) -> None:
    """Darken an ellipse: the shadow under a thing."""
    mask = Image.new("L", image.size, 0)
    ImageDraw.Draw(mask).ellipse(_box(x, y, rx, ry), fill=round(255 * opacity))
    image.paste("#1d1b3a", (0, 0), mask)


def _box(x: float, y: float, rx: float, ry: float) -> tuple[float, float, float, float]:
    return (x - rx) * SCALE, (y - ry) * SCALE, (x + rx) * SCALE, (y + ry) * SCALE
