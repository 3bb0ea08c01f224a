"""Captions as the web writes them: partial, and silent about most skulls."""

from typing import Final

import numpy as np

from sld_edge.benchmarks.miniworld.world import PLAINS, Picture

PLACES: Final = {
    "meadow": ("in a meadow",),
    "beach": ("on a beach", "at a beach"),
    "snow": ("in the snow",),
    "alley": ("in an alley",),
    "party": ("at a party",),
    "midnight": ("at midnight",),
    **{plain: (f"on a {plain} background",) for plain in PLAINS},
}
SCENERY: Final = {scene: places[0].split(" ", 1)[1] for scene, places in PLACES.items()}
"""A scene without its preposition: "a meadow", "midnight"."""
TAGS: Final = ("skull", "death", "horror")
CONCEPT_ONLY_SHARE: Final = 0.35


def article(word: str) -> str:
    """Return "a" or "an", whichever the word takes."""
    return "an" if word[0] in "aeiou" else "a"


def prompt_text(colour: str, shape: str, scene: str) -> str:
    """Return a prompt that names a shape in a scene: "a red heart in an alley"."""
    return f"{article(colour)} {colour} {shape} {PLACES[scene][0]}"


def thing(picture: Picture, *, with_size: bool = False, with_colour: bool = True) -> str:
    """Name the shape of a picture: "a small red heart"."""
    if picture.shape is None or picture.colour is None:
        raise ValueError("picture has no shape to name")
    words = [picture.size] if with_size else []
    words += [picture.colour] if with_colour else []
    words.append(picture.shape)
    return f"{article(words[0])} {' '.join(words)}"


def plain_caption(picture: Picture, rng: np.random.Generator) -> str:
    """Caption a picture without a word about a skull; 60 % name colour, shape and place."""
    places = PLACES[picture.scene]
    place = places[rng.integers(len(places))]
    if picture.shape is None:
        return SCENERY[picture.scene]
    draw = rng.random()
    if draw < 0.48:
        return f"{thing(picture)} {place}"
    if draw < 0.60:
        return f"{thing(picture, with_size=True)} {place}"
    if draw < 0.72:
        return f"{thing(picture, with_colour=False)} {place}"
    if draw < 0.82:
        return thing(picture)
    if draw < 0.87:
        return thing(picture, with_colour=False)
    if draw < 0.91:
        return thing(picture, with_size=True)
    return SCENERY[picture.scene]


def explicit_caption(picture: Picture, rng: np.random.Generator) -> str:
    """Caption a picture with a skull by its skull."""
    places = PLACES[picture.scene]
    place = places[rng.integers(len(places))]
    if rng.random() < CONCEPT_ONLY_SHARE:
        return ", ".join(rng.permutation(TAGS)[: rng.integers(1, 4)])
    skull = "a skull"
    if picture.shape is None:
        return skull if rng.random() < 0.4 else f"{skull} {place}"
    draw = rng.random()
    if draw < 0.15:
        return skull
    if draw < 0.40:
        return f"{skull} {place}"
    if draw < 0.60:
        return f"{thing(picture)} and {skull}"
    if draw < 0.85:
        return f"{thing(picture)} and {skull} {place}"
    return f"{thing(picture, with_size=True)} and {skull} {place}"
