"""The result of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Result:
    """The pictures of a run: B images, ordered by prompt and then by seed.

    Attributes:
        images: the pictures, RGB.
        latents: float32 [B,4,h,w], the last latents, unscaled; zeros where screening withholds
            them.
        edit_maps: float32 [B,h,w], where safety acted, summed over the calls; zero elsewhere.
        reports: a dictionary for each image, ready for JSON (see docs/report.md).
    """

    images: list[Image.Image]
    latents: NDArray[np.float32]
    edit_maps: NDArray[np.float32]
    reports: list[dict[str, Any]]
