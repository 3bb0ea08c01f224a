"""Files of a picture that a run keeps: sharp, blurred if it is flagged, or none.

Where safety acted is kept beside it, as a grey picture of the latent's size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sld_edge.benchmarks.evaluation.settings import Images
from sld_edge.runtime.picture import blurred, grey_from_edit_map, png_from_image

FOLDER, MAPS = "pictures", "edit-maps"


def kept_png(
    image: Image.Image, report: Mapping[str, Any], *, flagged: bool, images: Images
) -> bytes | None:
    """Return the PNG of a picture; None if none is kept."""
    if images == "discard":
        return None
    if images == "blur" and flagged:
        image = blurred(image)
    return png_from_image(image, report)


def kept_map(edit_map: NDArray[np.float32], *, images: Images) -> bytes | None:
    """Return the PNG of an edit map, float32 [h,w]; None if safety did nothing or none is kept.

    White is the map's own largest value.
    """
    if images == "discard" or not edit_map.any():
        return None
    return png_from_image(grey_from_edit_map(edit_map))


def picture_name(setting: str, prompt: int, image: int, *, folder: str = FOLDER) -> str:
    """Return a picture's place in the results folder, the same on every system."""
    words = re.sub(r"[^a-z0-9.+=-]+", "-", setting.lower().replace(",", "_")).strip("-.")
    return f"{folder}/{words}/{prompt:05d}-{image:03d}.png"
