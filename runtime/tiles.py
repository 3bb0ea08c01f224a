"""Decoding in overlapping tiles: a picture of any size in the memory of one tile.

Tiles of one picture are all of one size, so an engine meets one shape only. Where they overlap they
are blended with linear ramps, so no seam shows. Each tile is normalized by itself, which makes a
tiled picture differ a little from a whole one (docs/memory.md has numbers).
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
Profile = tuple[Sequence[int], Sequence[int], Sequence[int]]  # least, best, largest shape

_WHOLE_CELLS = 96 * 96  # "auto" decodes as a whole up to here: 768x768 pixels
_SIDE = 64  # cells: what Stable Diffusion's decoder was trained on
_LARGEST = 5 / 4  # of that: 1024 pixels are two tiles across, not three
_OVERLAP = 1 / 4  # of a tile's side, at least
_PLAN_CELLS = 4  # plans take multiples of it


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Sides of a tile in latent cells: height, width."""

    sides: tuple[int, int]

    def decoded(self, decode: Decode, latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Decode latents [1,4,h,w] tile by tile into a picture, uint8 [1,H,W,3].

        `decode` gets one tile's latents [1,4,h,w]. A side that is no longer than a tile's is not
        cut. Blended values are rounded half to even. The idea is diffusers'
        `AutoencoderKL.tiled_decode`, which cuts from the top left and so ends in narrow tiles.
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
    """Return the choice.

    Raises:
        InputError: it is none.
    """
    if choice not in get_args(VaeTiling):
        raise InputError("vae tiling", got=repr(choice), expected=", ".join(get_args(VaeTiling)))
    return cast(VaeTiling, choice)


def tiling_for(
    choice: VaeTiling, height: int, width: int, profile: Profile | None = None
) -> Tiling | None:
    """Return how latents of this size are cut; None decodes them as a whole.

    `profile` is a plan's, for latents [B,4,h,w]: tiles are of sizes that it takes.
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
    """Return about the shortest side with which a length is cut into the fewest tiles."""
    count = 1
    while (side := length / (count - (count - 1) * _OVERLAP)) > _SIDE * _LARGEST:
        count += 1
    return _PLAN_CELLS * math.ceil(side / _PLAN_CELLS)


def _spans(length: int, side: int) -> list[tuple[int, int]]:
    """Cut a length evenly into the fewest spans of one side that overlap enough."""
    if length <= side:
        return [(0, length)]
    overlap = int(side * _OVERLAP)
    count = -(-(length - overlap) // (side - overlap))
    starts = [round(index * (length - side) / (count - 1)) for index in range(count)]
    return [(start, start + side) for start in starts]


def _blended(
    parts: Sequence[NDArray[np.generic]], spans: Sequence[tuple[int, int]], length: int, axis: int
) -> NDArray[np.float32]:
    """Put parts that overlap together along one axis, [1,H,W,3], as float32.

    `spans` are cells, and so is `length`. A part's share falls linearly to nothing at an end that
    another part reaches beyond, and the shares of a pixel add up to 1.
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
        own = slice(start * factor, end * factor)
        place = (slice(None),) * axis + (own,)
        column = share[own].astype(np.float32).reshape((-1,) + (1,) * (3 - axis))
        whole[place] += part * column
    return whole
