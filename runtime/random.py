"""The noise of torch's random generators for a seed, without torch.

`torch` is the noise of a `torch.Generator` on the CPU, which diffusers' examples use; `philox` is
the noise of a generator on CUDA, which other tools call GPU or NV noise.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sld_edge.engines.errors import InputError

Rng = Literal["torch", "philox"]
Floats = NDArray[np.float32]
Words = NDArray[np.uint64]  # 32-bit words, with room for their products

MAX_SEED = 2**64 - 1
_WORD = 0xFFFFFFFF
_BLOCK = 16  # torch makes 16 normal numbers together on the CPU: 8 by cosine, 8 by sine


class NoiseSource(Protocol):
    """A seeded stream of standard normal numbers; each call continues the stream."""

    def normal(self, shape: tuple[int, ...]) -> Floats:
        """Draw float32 of this shape."""


def noise_source(rng: Rng, seed: int) -> NoiseSource:
    """Make a fresh stream.

    Raises:
        InputError: an unknown stream, or a seed outside 0 to 2**64 - 1.
    """
    if not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise InputError("seed", got=seed, expected="a whole number from 0 to 2**64 - 1")
    if rng == "torch":
        return TorchNoise(seed)
    if rng == "philox":
        return PhiloxNoise(seed)
    raise InputError("rng", got=repr(rng), expected="one of torch, philox")


class TorchNoise:
    """`torch.randn(shape, generator=torch.Generator().manual_seed(seed))`, float32 on the CPU.

    The uniform numbers are exactly torch's. Logarithms, sines and cosines are rounded correctly to
    float32 here; torch's AVX2 code has errors of a few units in the last place. Of 2e7 numbers 83 %
    were equal to the bit, 97.8 % within 1 unit, 99.9 % within 2, and all within 5e-7. torch without
    AVX2 rounds the angle in another way and is within 3e-6.
    Source: ATen/native/cpu/DistributionTemplates.h.
    """

    def __init__(self, seed: int) -> None:
        self._bits = _mersenne_twister(seed & _WORD)
        self._spare: float | None = None  # the second number of a pair, for the next small call

    def normal(self, shape: tuple[int, ...]) -> Floats:
        """Draw float32 of this shape, as a call of torch.randn does."""
        count = math.prod(shape)
        values = self._few(count) if count < _BLOCK else self._blocks(count)
        return values.reshape(shape)

    def _blocks(self, count: int) -> Floats:
        values = self._uniform(count)
        whole = count - count % _BLOCK
        values[:whole] = _normals_of_blocks(values[:whole])
        if whole < count:  # like torch, draw the last 16 numbers again
            values[-_BLOCK:] = _normals_of_blocks(self._uniform(_BLOCK))
        return values

    def _uniform(self, count: int) -> Floats:
        words = self._bits.random_raw(count) & 0xFFFFFF
        return words.astype(np.float32) * np.float32(2**-24)

    def _few(self, count: int) -> Floats:
        values = [] if self._spare is None or not count else [self._spare]
        if values:
            self._spare = None
        pairs = (count - len(values) + 1) // 2
        words = self._bits.random_raw(4 * pairs).reshape(pairs, 2, 2)
        doubles = ((words[..., 0] << np.uint64(32) | words[..., 1]) & (2**53 - 1)) * 2.0**-53
        radius = np.sqrt(-2 * np.log1p(-doubles[:, 1]))
        angle = 2 * np.pi * doubles[:, 0]
        values += np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).ravel().tolist()
        if len(values) > count:
            self._spare = values.pop()
        return np.array(values, np.float32)


def _mersenne_twister(seed: int) -> np.random.MT19937:
    """Seed MT19937 with one word (Matsumoto and Nishimura's init_genrand)."""
    key = np.empty(624, np.uint32)
    word = seed
    for i in range(624):
        if i:
            word = (1812433253 * (word ^ (word >> 30)) + i) & _WORD
        key[i] = word
    bits = np.random.MT19937()
    bits.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": 624}}
    return bits


def _normals_of_blocks(uniform: Floats) -> Floats:
    """Turn each 16 uniform numbers into 16 normal numbers (Box and Muller), rounded to float32."""
    first, second = uniform.reshape(-1, 2, _BLOCK // 2).swapaxes(0, 1)
    log = np.log(1 - first.astype(np.float64)).astype(np.float32)
    radius = np.sqrt(np.float32(-2) * log)
    angle = (np.float32(2 * np.pi) * second).astype(np.float64)
    cosine, sine = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    return np.stack([radius * cosine, radius * sine], axis=1).ravel()


class PhiloxNoise:
    """`torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda")`.

    Element i is the first of the four normal numbers of CUDA thread i, and each call moves every
    thread on by a block of four. torch does the same as long as the GPU has a thread for every
    element: up to 40,960 elements on a T4, 270,336 on an H100, 12,288 on the smallest Orin. For
    more elements torch's numbers depend on the GPU; these numbers do not, and are equal to those of
    stable-diffusion.cpp and of AUTOMATIC1111's NV source.
    Source: ATen/native/cuda/DistributionTemplates.h; curand's Box-Muller.
    """

    def __init__(self, seed: int) -> None:
        self._key = (seed & _WORD, seed >> 32)
        self._calls = 0

    def normal(self, shape: tuple[int, ...]) -> Floats:
        """Draw float32 of this shape, as a call of torch.randn does."""
        threads = np.arange(math.prod(shape), dtype=np.uint64)
        counter = np.zeros((4, threads.size), np.uint64)
        counter[0], counter[2] = self._calls, threads
        self._calls += 1
        first, second, _, _ = philox4x32(counter, self._key)
        radius = np.sqrt(-2 * np.log((first + 0.5) * 2.0**-32))
        values: Floats = (radius * np.sin((second + 0.5) * (2.0**-31 * np.pi))).astype(np.float32)
        return values.reshape(shape)


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Mix counters, [4,...] words, in 10 rounds of Philox4x32 (Salmon et al., SC11)."""
    x0, x1, x2, x3 = counter
    key0, key1 = key
    shift, mask = np.uint64(32), np.uint64(_WORD)
    for _ in range(10):
        left, right = x0 * np.uint64(0xD2511F53), x2 * np.uint64(0xCD9E8D57)
        x0, x1 = right >> shift ^ x1 ^ np.uint64(key0), right & mask
        x2, x3 = left >> shift ^ x3 ^ np.uint64(key1), left & mask
        key0, key1 = (key0 + 0x9E3779B9) & _WORD, (key1 + 0xBB67AE85) & _WORD
    return np.stack([x0, x1, x2, x3])
