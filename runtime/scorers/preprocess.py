"""Converts pictures to the inputs of the scorers' networks. B pictures, uint8 [B,H,W,3]."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sld_edge.runtime.scorers.base import Pictures

Floats = NDArray[np.float32]

# CLIP's constants (Radford et al. 2021; openai/CLIP, preprocessor_config.json of checkpoints).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# Caffe's means of ImageNet, from open_nsfw's training, in the order B, G, R.
_CAFFE_MEAN = np.array([104, 117, 123], np.float32)


def clip_pixels(
    pictures: Pictures,
    size: int = 224,
    *,
    mean: Sequence[float] = CLIP_MEAN,
    std: Sequence[float] = CLIP_STD,
) -> Floats:
    """Return float32 [B,3,size,size]: shortest side to `size`, centre cropped, normalized.

    Bicubic with antialiasing on bytes, as in transformers' CLIPImageProcessor with Pillow.
    """
    height, width = pictures.shape[1:3]
    shortest = min(height, width)
    wide, high = size * width // shortest, size * height // shortest
    left, top = (wide - size) // 2, (high - size) // 2
    cropped = [
        np.asarray(Image.fromarray(picture).resize((wide, high), Image.Resampling.BICUBIC))[
            top : top + size, left : left + size
        ]
        for picture in pictures
    ]
    scaled = np.stack(cropped).astype(np.float32) / np.float32(255)
    normal = (scaled - np.array(mean, np.float32)) / np.array(std, np.float32)
    return np.ascontiguousarray(normal.transpose(0, 3, 1, 2))


def open_nsfw_pixels(pictures: Pictures) -> Floats:
    """Return float32 [B,224,224,3]: resized to 256, centre cropped, as JPEG, BGR minus the mean.

    The network was trained on JPEGs; JPEG's loss of detail is part of its published scores.
    """
    margin = (256 - 224) // 2
    seen = []
    for picture in pictures:
        image = Image.fromarray(picture).resize((256, 256), Image.Resampling.BILINEAR)
        stream = io.BytesIO()
        image.crop((margin, margin, margin + 224, margin + 224)).save(stream, "JPEG")
        with Image.open(stream) as jpeg:
            seen.append(np.asarray(jpeg, np.float32)[:, :, ::-1] - _CAFFE_MEAN)
    return np.ascontiguousarray(np.stack(seen))


def nudenet_pixels(pictures: Pictures, size: int = 320) -> Floats:
    """Return float32 [B,3,size,size], 0 to 1, BGR, padded to a square with black.

    Bilinear without antialiasing, rounded to bytes, as in OpenCV. The channels are in the order of
    NudeNet 3: blue first.
    """
    count, height, width, _ = pictures.shape
    side = max(height, width)
    square = np.zeros((count, side, side, 3), np.float32)
    square[:, :height, :width] = pictures
    low, high, part = _samples(side, size)
    rows = square[:, low] * (1 - part[:, None, None]) + square[:, high] * part[:, None, None]
    both = rows[:, :, low] * (1 - part[:, None]) + rows[:, :, high] * part[:, None]
    levels = np.floor(both + np.float32(0.5)) / np.float32(255)
    return np.ascontiguousarray(levels[..., ::-1].transpose(0, 3, 1, 2))


def _samples(old: int, new: int) -> tuple[NDArray[np.intp], NDArray[np.intp], Floats]:
    """Return the old pixels before and after each new pixel, and the weight of the second."""
    centres = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    low = np.floor(centres).astype(np.intp)
    return low, np.minimum(low + 1, old - 1), (centres - low).astype(np.float32)
