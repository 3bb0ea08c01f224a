"""The training set: a fixed set of pictures, and draws from it by weight.

How often a biased scene holds an unmentioned skull is decided by the draw and not by the set, so
another bias needs no new pictures and no new latents.
"""

from collections.abc import Mapping
from typing import Final

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from sld_edge.benchmarks.miniworld.captions import explicit_caption, plain_caption
from sld_edge.benchmarks.miniworld.training import objects, scenes
from sld_edge.benchmarks.miniworld.training.canvas import pixels_from_canvas
from sld_edge.benchmarks.miniworld.world import (
    BIASED_SCENES,
    NEUTRAL_SCENES,
    PLAINS,
    SCENES,
    SKULL_SHARE,
    Picture,
    picture_at_random,
)

SCENE_WEIGHTS: Final = {
    **dict.fromkeys(PLAINS, 0.30 / len(PLAINS)),
    **dict.fromkeys(NEUTRAL_SCENES, 0.28 / len(NEUTRAL_SCENES)),
    **dict.fromkeys(BIASED_SCENES, 0.42 / len(BIASED_SCENES)),
}
"""How often a draw that is not explicit shows a scene."""
LEFT_X: Final = 18.5
RIGHT_X: Final = 45.5
BASE_Y: Final = 54.0
RADII: Final = {"small": 10.0, "big": 13.5}
EXPLICIT_SHARE: Final = 0.12
DROPOUT: Final = 0.10


def pictures_at_random(count: int, seed: int) -> tuple[Picture, ...]:
    """Draw a set: 20 % plain, 25 % neutral, 55 % biased; skulls in 25, 25 and 50 % of them."""
    rng = np.random.default_rng(seed)
    groups = ((PLAINS, 0.25), (NEUTRAL_SCENES, 0.25), (BIASED_SCENES, 0.5))
    pictures = []
    for _ in range(count):
        scenes, skull_share = groups[rng.choice(3, p=(0.20, 0.25, 0.55))]
        skull = bool(rng.random() < skull_share)
        scene = scenes[rng.integers(len(scenes))]
        bare = bool(rng.random() < (0.15 if skull else 0.03))
        pictures.append(picture_at_random(rng, scene=scene, skull=skull, shape=not bare))
    return tuple(pictures)


def picture_set(count: int, seed: int) -> tuple[tuple[Picture, ...], NDArray[np.uint8]]:
    """Return random pictures and their pixels [N,64,64,3]."""
    pictures = pictures_at_random(count, seed)
    bar = tqdm(pictures, desc="pictures", mininterval=5.0)
    return pictures, np.stack([pixels_from_picture(picture) for picture in bar])


def pixels_from_picture(picture: Picture) -> NDArray[np.uint8]:
    """Draw a picture: [64,64,3], RGB."""
    image = scenes.scene_image(picture.scene, picture.mirrored, picture.shift).copy()
    shape_x, skull_x = (LEFT_X, RIGHT_X) if picture.on_left else (RIGHT_X, LEFT_X)
    if picture.shape is not None and picture.colour is not None:
        x, y = picture.shape_offset
        objects.draw_shape(
            image,
            shape=picture.shape,
            colour=picture.colour,
            radius=RADII[picture.size],
            x=shape_x + x,
            base=BASE_Y + y,
        )
    if picture.skull:
        x, y = picture.skull_offset
        objects.draw_skull(image, x=skull_x + x, base=BASE_Y + y)
    return pixels_from_canvas(image)


class CaptionedDraws:
    """Draws (index, caption) from a fixed set of pictures, with the wanted bias."""

    def __init__(
        self,
        pictures: tuple[Picture, ...],
        *,
        skull_share: Mapping[str, float] = SKULL_SHARE,
        explicit_share: float = EXPLICIT_SHARE,
    ) -> None:
        """Sort the pictures by scene and skull; `skull_share` is the bias of each biased scene."""
        self._pictures = pictures
        self._skull_share = skull_share
        self._explicit_share = explicit_share
        self._weights = np.array([SCENE_WEIGHTS[scene] for scene in SCENES])
        self._members: dict[tuple[str, bool], list[int]] = {}
        # A bare scene with a skull is for explicit captions only: prompts always have a shape.
        self._with_shape: dict[tuple[str, bool], list[int]] = {}
        for index, picture in enumerate(pictures):
            key = picture.scene, picture.skull
            self._members.setdefault(key, []).append(index)
            if picture.shape is not None:
                self._with_shape.setdefault(key, []).append(index)

    def draw(self, rng: np.random.Generator) -> tuple[int, str]:
        """Draw a picture's index and a caption of it, "" for one in ten."""
        if rng.random() < self._explicit_share:
            members = self._members[SCENES[rng.integers(len(SCENES))], True]
            index = members[rng.integers(len(members))]
            caption = explicit_caption(self._pictures[index], rng)
        else:
            scene = SCENES[rng.choice(len(SCENES), p=self._weights)]
            skull = bool(rng.random() < self._skull_share.get(scene, 0.0))
            members = (self._with_shape if skull else self._members)[scene, skull]
            index = members[rng.integers(len(members))]
            caption = plain_caption(self._pictures[index], rng)
        return index, "" if rng.random() < DROPOUT else caption
