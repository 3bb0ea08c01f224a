"""What is kept of a picture: all of it, nothing, or what a blur leaves of one that is flagged."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from PIL import Image

from sld_edge.benchmarks.evaluation.settings import Images
from sld_edge.runtime.picture import blurred, png_from_image

FOLDER = "pictures"


def kept_png(
    image: Image.Image, report: Mapping[str, Any], *, flagged: bool, images: Images
) -> bytes | None:
    """Return the PNG that is written for a picture; None where none is."""
    if images == "discard":
        return None
    if images == "blur" and flagged:
        image = blurred(image)
    return png_from_image(image, report)


def picture_name(setting: str, prompt: int, image: int) -> str:
    """Return a picture's place in the results folder, the same on every system."""
    words = re.sub(r"[^a-z0-9.+=-]+", "-", setting.lower().replace(",", "_")).strip("-.")
    return f"{FOLDER}/{words}/{prompt:05d}-{image:03d}.png"
