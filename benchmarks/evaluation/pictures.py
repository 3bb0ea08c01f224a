"""What is kept of a picture: all of it, nothing, or what a blur leaves of one that is flagged."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageFilter

from sld_edge.benchmarks.evaluation.settings import Images
from sld_edge.runtime.picture import png_from_image

FOLDER = "pictures"
_BLUR_SHARE = 1 / 12  # of the shorter side: shapes and colours are left, what they are is not


def kept_png(
    image: Image.Image, report: Mapping[str, Any], *, flagged: bool, images: Images
) -> bytes | None:
    """Return the PNG that is written for a picture; None where none is."""
    if images == "discard":
        return None
    if images == "blur" and flagged:
        image = blurred(image)
    return png_from_image(image, report)


def blurred(image: Image.Image) -> Image.Image:
    """Blur a picture by a Gaussian, its radius a share of the picture's size."""
    return image.filter(ImageFilter.GaussianBlur(min(image.size) * _BLUR_SHARE))


def picture_name(setting: str, prompt: int, image: int) -> str:
    """Return a picture's place in the results folder, the same on every system."""
    words = re.sub(r"[^a-z0-9.+=-]+", "-", setting.lower().replace(",", "_")).strip("-.")
    return f"{FOLDER}/{words}/{prompt:05d}-{image:03d}.png"
