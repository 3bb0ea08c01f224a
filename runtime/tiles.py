"""Decoding in overlapping tiles: a picture of any size in the memory of one tile.

All tiles of a picture have the same size, so an engine runs with a single shape. Overlaps are
blended with linear ramps, so no seam is visible. The decoder normalizes each tile by itself, so a
picture decoded in tiles differs a little from a picture decoded as a whole (docs/memory.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from sld_edge.engines.errors import InputError

VaeTiling = Literal["auto", "on", "off"]
Decode = Callable[[NDArray[np.float32]], NDArray[np.uint8]]
Profile = tuple[Sequence[int], Sequence[int], Sequence[int]]  # smallest, best and largest shape

_WHOLE_CELLS = 96 * 96  # "auto" decodes up to 768x768 pixels as a whole
_SIDE = 64  # cells; Stable Diffusion's decoder was trained on this size
_LARGEST = 5 / 4  # of _SIDE, so that 1024 pixels need two tiles across and not three
_OVERLAP = 1 / 4  # smallest overlap, of a tile's side
_PLAN_CELLS = 4  # plans take sides that are multiples of this


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Sides of a tile in latent cells: height, width."""

    sides: tuple[int, int]

    def decoded(self, decode: Decode, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Decode latents [1,4,h,w] tile by tile into a picture, uint8 [1,H,W,3].

        `decode` takes the latents of a tile, [1,4,h,w]. A side that is no longer than a tile's is
        not cut. Blended values are rounded half to even. The idea is from diffusers'
        `AutoencoderKL.tiled_decode`, whose tiles at the right and lower edges are narrow.
        """
        height, width = latents.shape[2:]
        rows, columns = (_spans(*pair) for pair in zip((height, width), self.sides, strict=True))
        if len(rows) == len(columns) == 1:
            return decode(latents)
        bands = []
        for top, bottom in rows:
            tiles = [
                decode(np.ascontiguousarray(latents[:, :, top:bottom, left:right]))
                for left, right in columns
            ]
            bands.append(_blended(tiles, columns, width, axis=2))
        return np.rint(_blended(bands, rows, height, axis=1)).astype(np.uint8)


def checked_tiling(choice: str) -> VaeTiling:
    """Return the choice after checking it.

    Raises:
        InputError: not "auto", "on" or "off".
    """
    if choice not in get_args(VaeTiling):
        raise InputError("vae tiling", got=repr(choice), expected=", ".join(get_args(VaeTiling)))
    return cast(VaeTiling, choice)


def tiling_for(
    choice: VaeTiling, height: int, width: int, profile: Profile | None = None
) -> Tiling | None:
    """Return the tiling for latents of this size in cells; None decodes them as a whole.

    With the `profile` of a plan for latents [B,4,h,w], tiles have a size that the plan takes.
    """
    if choice == "off" or (choice == "auto" and height * width <= _WHOLE_CELLS):
        return None
    sides = _side(height), _side(width)
    if profile is not None:
        least, _, most = profile
        rows, columns = (
            min(max(side, least[axis]), most[axis])
            for side, axis in zip(sides, (2, 3), strict=True)
        )
        sides = rows, columns
    return Tiling(sides=sides)


def _side(length: int) -> int:
    """Return about the shortest side of tiles that cover a length with the fewest tiles."""
    count = 1
    while (side := length / (count - (count - 1) * _OVERLAP)) > _SIDE * _LARGEST:
        count += 1
    return _PLAN_CELLS * math.ceil(side / _PLAN_CELLS)


def _spans(length: int, side: int) -> list[tuple[int, int]]:
    """Return evenly spaced spans of length `side`: as few as cover a length and overlap enough."""
    if length <= side:
        return [(0, length)]
    overlap = int(side * _OVERLAP)
    count = -(-(length - overlap) // (side - overlap))
    starts = [round(index * (length - side) / (count - 1)) for index in range(count)]
    return [(start, start + side) for start in starts]


def _blended(
    parts: Sequence[NDArray[np.generic]], spans: Sequence[tuple[int, int]], length: int, axis: int
) -> NDArray[np.float32]:
    """Join overlapping parts [1,H,W,3] along an axis, as float32.

    `spans` and `length` are in cells. Within an overlap a part's share falls linearly to zero at
    the part's end, and the shares of a pixel add up to 1.
    """
    factor = parts[0].shape[axis] // (spans[0][1] - spans[0][0])
    shares = np.zeros((len(spans), length * factor))
    for share, (start, end) in zip(shares, spans, strict=True):
        pixel = np.arange(start * factor, end * factor) + 0.5
        before = pixel - start * factor if start > 0 else np.inf
        after = end * factor - pixel if end < length else np.inf
        share[start * factor : end * factor] = np.minimum(
            np.minimum(before, after), length * factor
        )
    shares /= shares.sum(axis=0)
    shape = list(parts[0].shape)
    shape[axis] = length * factor
    whole = np.zeros(shape, np.float32)
    for part, share, (start, end) in zip(parts, shares, spans, strict=True):
        pixels = slice(start * factor, end * factor)
        place = (slice(None),) * axis + (pixels,)
        column = share[pixels].astype(np.float32).reshape((-1,) + (1,) * (3 - axis))
        whole[place] += part * column
    return whole
