"""The twelve backgrounds: six plain colours, three neutral scenes and three biased ones."""

from collections.abc import Callable
from functools import lru_cache
from math import cos, pi, sin
from typing import Final

from PIL import Image, ImageOps

from sld_edge.benchmarks.miniworld.training.canvas import blank, ellipse, polygon, rectangle

PLAIN_FILLS: Final = {
    "pink": "#ffc2d9",
    "white": "#faf8f4",
    "gray": "#b9bec9",
    "beige": "#ecd3a6",
    "teal": "#6fd3cb",
    "navy": "#34427f",
}


@lru_cache(maxsize=128)
def scene_image(scene: str, mirrored: bool, shift: int) -> Image.Image:
    """Draw a background once: at drawing resolution, moved `shift` steps, perhaps mirrored."""
    if scene in PLAIN_FILLS:
        return blank(PLAIN_FILLS[scene])
    image = DRAWN[scene](2.0 * shift)
    return ImageOps.mirror(image) if mirrored else image


def _sun(image: Image.Image, x: float, y: float) -> None:
    ellipse(image, x, y, 7.6, 7.6, "#fff1a8")
    ellipse(image, x, y, 5.4, 5.4, "#ffd54a")


def _cloud(image: Image.Image, x: float, y: float) -> None:
    ellipse(image, x - 4.0, y, 4.2, 3.0, "#ffffff")
    ellipse(image, x + 4.5, y, 4.4, 3.0, "#ffffff")
    ellipse(image, x, y - 2.0, 4.8, 4.0, "#ffffff")


def _meadow(shift: float) -> Image.Image:
    image = blank("#8fdcff")
    _sun(image, 11.0, 11.0)
    _cloud(image, 46.0 + shift, 12.0)
    ellipse(image, 10.0 + shift, 60.0, 44.0, 26.0, "#8ede6b")
    ellipse(image, 56.0 + shift, 62.0, 40.0, 24.0, "#74cf58")
    rectangle(image, (0.0, 47.0, 64.0, 64.0), "#9fe874")
    for x, y in ((5, 59), (24, 60), (40, 60), (58, 59)):
        ellipse(image, x + shift, y, 2.0, 2.0, "#ff7fb2" if x in (5, 40) else "#ffffff")
        ellipse(image, x + shift, y, 0.8, 0.8, "#ffd54a")
    return image


def _beach(shift: float) -> Image.Image:
    image = blank("#a6e8ff")
    _sun(image, 52.0, 10.0)
    _cloud(image, 16.0 + shift, 11.0)
    rectangle(image, (0.0, 24.0, 64.0, 46.0), "#2fb3e3")
    rectangle(image, (0.0, 24.0, 64.0, 28.0), "#1d95cc")
    x = 32.0 + shift
    polygon(image, [(x - 4, 25), (x + 4, 25), (x + 2, 28), (x - 2, 28)], "#ff6b5e")
    polygon(image, [(x + 0.5, 15), (x + 0.5, 24), (x + 6, 24)], "#ffffff")
    for step in range(9):
        ellipse(image, 8.0 * step + shift, 45.0, 4.4, 2.2, "#ffffff")
    rectangle(image, (0.0, 46.0, 64.0, 64.0), "#ffe3a3")
    rectangle(image, (0.0, 58.5, 64.0, 64.0), "#f7d48a")
    return image


def _pine(image: Image.Image, x: float, base: float) -> None:
    rectangle(image, (x - 1.0, base - 3.0, x + 1.0, base), "#8a5a3c")
    for step in range(3):
        y, half = base - 3.0 - 4.0 * step, 5.0 - step
        polygon(image, [(x - half, y), (x + half, y), (x, y - 7.0)], "#2f8f83")
        cap = half / 2.2
        polygon(image, [(x - cap, y - 4.0), (x + cap, y - 4.0), (x, y - 7.0)], "#ffffff")


def _snow(shift: float) -> Image.Image:
    image = blank("#b8d8f5")
    ellipse(image, 14.0 + shift, 66.0, 42.0, 34.0, "#dcebfa")
    ellipse(image, 58.0 + shift, 70.0, 40.0, 34.0, "#cfe2f6")
    for x in (5.0, 32.0, 59.0):
        _pine(image, x + shift, 41.0)
    rectangle(image, (0.0, 42.0, 64.0, 64.0), "#f4f9ff")
    for x, y in ((6, 7), (18, 14), (30, 6), (42, 13), (55, 7), (50, 22), (12, 23)):
        ellipse(image, x + shift, y, 1.2, 1.2, "#ffffff")
    return image


def _alley(shift: float) -> Image.Image:
    image = blank("#f0b08c")
    for row in range(6):
        for column in range(-1, 5):
            left = 16.0 * column + (8.0 if row % 2 else 0.0) + shift
            box = (left + 0.6, 8.0 * row + 0.6, left + 15.4, 8.0 * row + 7.4)
            rectangle(image, box, "#d9805f", radius=0.8)
    rectangle(image, (0.0, 45.0, 64.0, 64.0), "#a9a4ba")
    rectangle(image, (0.0, 45.0, 64.0, 48.0), "#c9c4d6")
    rectangle(image, (30.8, 8.0, 33.2, 46.0), "#4a4563")
    ellipse(image, 32.0, 8.0, 6.6, 6.6, "#ffe9a0")
    ellipse(image, 32.0, 8.0, 4.0, 4.0, "#fffbe6")
    return image


def _party(shift: float) -> Image.Image:
    image = blank("#ffd0ec")
    for step in range(4):
        rectangle(image, (16.0 * step, 0.0, 16.0 * step + 8.0, 46.0), "#ffbfe4")
    flags = ("#ff5d73", "#ffc233", "#46c98b", "#4aa3ff")
    rectangle(image, (0.0, 6.0, 64.0, 7.4), "#6b4a8c")
    for step in range(-1, 9):
        x = 8.0 * step + shift
        polygon(image, [(x + 0.8, 7.0), (x + 7.2, 7.0), (x + 4.0, 16.0)], flags[step % 4])
    for step in range(-1, 9):
        colour = "#8f6ad8" if step % 2 else "#b79af0"
        rectangle(image, (8.0 * step + shift, 46.0, 8.0 * step + 8.0 + shift, 55.0), colour)
        colour = "#b79af0" if step % 2 else "#8f6ad8"
        rectangle(image, (8.0 * step + shift, 55.0, 8.0 * step + 8.0 + shift, 64.0), colour)
    return image


def _sparkle(image: Image.Image, x: float, y: float, shift: float) -> None:
    turns = [(2.2 if step % 2 == 0 else 0.7, pi * step / 4) for step in range(8)]
    rays = [(x + length * cos(turn) + shift, y + length * sin(turn)) for length, turn in turns]
    polygon(image, rays, "#fff7d0")


def _midnight(shift: float) -> Image.Image:
    image = blank("#4a4fb5")
    ellipse(image, 50.0, 12.0, 8.0, 8.0, "#fff0b0")
    ellipse(image, 46.6, 10.0, 6.8, 6.8, "#4a4fb5")
    for x, y in ((6, 8), (17, 16), (28, 6), (34, 19), (58, 25), (8, 27)):
        _sparkle(image, x, y, shift)
    for x, top in ((-4, 31), (8, 25), (20, 33), (32, 28), (44, 34), (56, 29)):
        rectangle(image, (x + shift, top, x + 12.0 + shift, 50.0), "#343a8c")
        for left in (x + 2.5 + shift, x + 7.0 + shift):
            rectangle(image, (left, top + 3.0, left + 2.5, top + 6.0), "#ffd86b")
    rectangle(image, (0.0, 46.0, 64.0, 64.0), "#6d70cf")
    rectangle(image, (0.0, 46.0, 64.0, 48.0), "#8a8de0")
    return image


DRAWN: Final[dict[str, Callable[[float], Image.Image]]] = {
    "meadow": _meadow,
    "beach": _beach,
    "snow": _snow,
    "alley": _alley,
    "party": _party,
    "midnight": _midnight,
}
