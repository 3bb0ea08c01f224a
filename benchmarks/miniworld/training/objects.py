"""The things that stand in a picture: five shapes as glossy stickers, and the skull."""

from math import cos, pi, sin
from typing import Final

from PIL import Image

from sld_edge.benchmarks.miniworld.training.canvas import (
    Point,
    ellipse,
    polygon,
    rectangle,
    shade,
    stroke,
)

PAINTS: Final = {  # a fill and a rim
    "red": ("#f0334a", "#8e1026"),
    "orange": ("#ff8c1a", "#a34700"),
    "yellow": ("#ffde2b", "#9c7400"),
    "green": ("#27b84c", "#0b6425"),
    "blue": ("#2a78f5", "#0d3a94"),
    "purple": ("#9846e6", "#521494"),
}
BORDER: Final = 1.7
RIM: Final = 1.2
ROUNDING: Final = 1.6
GLOSS: Final[dict[str, Point]] = {
    "circle": (-0.38, -0.42),
    "square": (-0.45, -0.45),
    "triangle": (-0.12, -0.02),
    "star": (-0.16, -0.26),
    "heart": (-0.46, -0.34),
}


def outline(shape: str, radius: float) -> list[Point]:
    """Return the corners of a shape about the origin; its lowest point is at y = radius."""
    if shape == "circle":
        turns = [2 * pi * step / 48 for step in range(48)]
        return [(radius * cos(turn), radius * sin(turn)) for turn in turns]
    if shape == "square":
        half = 0.92 * radius
        top, bottom = radius - 2 * half, radius
        return [(-half, top), (half, top), (half, bottom), (-half, bottom)]
    if shape == "triangle":
        return [(0.0, -0.95 * radius), (1.12 * radius, radius), (-1.12 * radius, radius)]
    if shape == "star":
        reach = 1.18 * radius
        corners = []
        for step in range(10):
            length = reach if step % 2 == 0 else 0.5 * reach
            turn = pi * step / 5 - pi / 2
            corners.append((length * cos(turn), length * sin(turn)))
        lift = radius - max(y for _, y in corners)
        return [(x, y + lift) for x, y in corners]
    turns = [2 * pi * step / 48 for step in range(48)]
    return [
        (
            radius / 15.5 * 16 * sin(turn) ** 3,
            -radius
            / 15.5
            * (13 * cos(turn) - 5 * cos(2 * turn) - 2 * cos(3 * turn) - cos(4 * turn) - 1.5),
        )
        for turn in turns
    ]


def draw_shape(
    image: Image.Image, *, shape: str, colour: str, radius: float, x: float, base: float
) -> None:
    """Draw a sticker of a shape that stands on y = base."""
    shade(image, x, base + 0.4, 1.05 * radius, 2.4, 0.28)
    y = base - radius
    points = [(x + px, y + py) for px, py in outline(shape, radius - BORDER - RIM)]
    stroke(image, points, 2 * (BORDER + RIM + ROUNDING), "#ffffff")
    fill, rim = PAINTS[colour]
    stroke(image, points, 2 * (RIM + ROUNDING), rim)
    stroke(image, points, 2 * ROUNDING, fill)
    polygon(image, points, fill)
    dx, dy = GLOSS[shape]
    ellipse(image, x + dx * radius, y + dy * radius, 0.15 * radius, 0.13 * radius, "#ffffff")


def draw_skull(image: Image.Image, *, x: float, base: float) -> None:
    """Draw the skull, 23 pixels wide and 26 high, standing on y = base."""
    shade(image, x, base + 0.4, 10.0, 2.4, 0.28)
    y = base - 15.5
    for grow, colour in ((1.4, "#23203f"), (0.0, "#fdf8ea")):
        ellipse(image, x, y, 10.4 + grow, 9.6 + grow, colour)
        box = (x - 6.0 - grow, y + 4.0, x + 6.0 + grow, y + 14.0 + grow)
        rectangle(image, box, colour, radius=2.4)
    ellipse(image, x - 4.3, y + 1.0, 2.9, 3.2, "#23203f")
    ellipse(image, x + 4.3, y + 1.0, 2.9, 3.2, "#23203f")
    polygon(image, [(x, y + 4.4), (x - 1.5, y + 7.4), (x + 1.5, y + 7.4)], "#23203f")
    for step in (-2.6, 0.0, 2.6):
        rectangle(image, (x + step - 0.5, y + 10.0, x + step + 0.5, y + 14.0), "#23203f")
