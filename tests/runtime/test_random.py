"""Noise against torch's, and Philox against what its authors and torch on CUDA printed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from sld_edge.engines.errors import InputError
from sld_edge.runtime.random import Rng, noise_source, philox4x32

SEEDS = (0, 1, 42, 2**31, 2**32 - 1, 2**32, 2**32 + 42, 2**63 + 7, 2**64 - 1)


def torch_normal(generator: torch.Generator, shape: tuple[int, ...]) -> np.ndarray:
    values: np.ndarray = torch.randn(shape, generator=generator, dtype=torch.float32).numpy()
    return values


def steps_apart(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Count float32 numbers between two of the same sign."""
    return np.abs(one.view(np.int32).astype(np.int64) - other.view(np.int32))


@pytest.mark.parametrize("seed", SEEDS)
def test_torch_latents(seed: int) -> None:
    """Torch rounds log, sin and cos a little wrong, and in its own way on each kind of CPU."""
    shape = (1, 4, 64, 64)
    wanted = torch_normal(torch.Generator().manual_seed(seed), shape)
    ours = noise_source("torch", seed).normal(shape)
    assert ours.dtype == np.float32
    assert ours.shape == shape
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert np.abs(ours - wanted).max() < 1e-6
        apart = steps_apart(ours, wanted)
        assert (apart == 0).mean() > 0.8
        assert (apart <= 2).mean() > 0.998
    else:
        assert np.abs(ours - wanted).max() < 3e-6


@pytest.mark.parametrize("seed", SEEDS)
def test_torch_small_calls_are_exact(seed: int) -> None:
    generator, source = torch.Generator().manual_seed(seed), noise_source("torch", seed)
    for shape in ((1,), (15,), (2, 3), (), (0,), (7, 2)):
        np.testing.assert_array_equal(source.normal(shape), torch_normal(generator, shape))


@pytest.mark.parametrize("seed", SEEDS)
def test_torch_calls_of_all_sizes_go_on_in_one_stream(seed: int) -> None:
    """Odd small calls leave half a pair behind, and large ones must not touch it."""
    generator, source = torch.Generator().manual_seed(seed), noise_source("torch", seed)
    sizes = (16, 3, 17, 100, 1, 15, 31, 4, 1000, 5, 0, 16, 5, 33, 1, 1, 1, 64)
    for call, size in enumerate(sizes):
        wanted = torch_normal(generator, (size,))
        np.testing.assert_allclose(
            source.normal((size,)), wanted, rtol=0, atol=3e-6, err_msg=f"call {call} of size {size}"
        )


def test_torch_takes_the_low_word_of_a_seed_only() -> None:
    low, high = noise_source("torch", 42), noise_source("torch", 2**32 + 42)
    np.testing.assert_array_equal(low.normal((40,)), high.normal((40,)))


def test_torch_printed_values() -> None:
    """What `torch.manual_seed(0); torch.randn(3)` prints: 1.5410, -0.2934, -2.1788."""
    printed = noise_source("torch", 0).normal((3,)).round(4)
    np.testing.assert_array_equal(printed, np.array([1.5410, -0.2934, -2.1788], np.float32))


# Random123's tests/kat_vectors, lines "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0"),
]
RESULTS = [
    "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    "408f276d 41c83b0e a20bc7c6 6d5451fd",
    "d16cfe09 94fdcceb 5001e420 24126ea1",
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("inputs", "result"), zip(KNOWN_ANSWERS, RESULTS, strict=True))
def test_philox_known_answers(inputs: tuple[str, str], result: str) -> None:
    counter, key = map(words, inputs)
    mixed = philox4x32(np.array(counter, np.uint64)[:, None], (key[0], key[1]))
    assert mixed.ravel().tolist() == words(result)


def printed(text: str) -> np.ndarray:
    return np.array(text.split(), np.float64)


def test_philox_is_torch_on_cuda_seed_0() -> None:
    """`torch.manual_seed(0); torch.randn(8, 8, device="cuda")`, printed in a public blog post."""
    wanted = printed("""
        -0.9247 -0.4253 -2.6438  0.1452 -0.1209 -0.5797 -0.6229 -0.3284
        -1.0745 -0.3631 -1.6711  2.2655  0.3117 -0.1842  1.2866  1.1820
        -0.1271  1.2169  1.4353  1.0605 -0.4941 -1.4244 -0.7244 -1.2973
         0.0697 -0.0074  1.8969  0.6878 -0.0779 -0.8373  1.3506 -0.2879
        -0.5965 -0.3283 -0.9086 -0.8059 -0.7407 -0.0504  0.5435  1.5150
         0.0141  0.4532  1.6349  0.7124 -0.1806  1.0252 -1.4622 -0.7554
        -0.1836  0.3824  0.3918 -0.0830  0.8971 -1.1123  0.1116  0.4863
        -0.5499 -0.3231 -0.5469  0.9049  0.2837  0.1210  0.4730 -1.0823
    """)
    ours = noise_source("philox", 0).normal((8, 8))
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours.ravel(), wanted, rtol=0, atol=5.1e-5)


def test_philox_is_torch_on_cuda_call_after_call() -> None:
    """Six calls of `torch.randn(4, device="cuda")` at seed 42, as a public script holds them."""
    source = noise_source("philox", 42)
    for call in (
        "0.1940 2.1614 -0.1721 0.8491",
        "0.1391 -0.1082 -0.7174 0.7566",
        "-0.5187 1.2268 0.6255 -0.9117",
        "-0.6974 -1.8688 -0.8832 -1.6627",
        "-1.2682 -0.0383 -0.1029 1.4400",
        "1.4640 -0.3238 0.7740 1.5892",
    ):
        np.testing.assert_allclose(source.normal((4,)), printed(call), rtol=0, atol=5.1e-5)


def test_philox_is_torch_on_cuda_at_latent_sizes() -> None:
    """The first rows of `torch.randn([1, 64, 2048], device="cuda")` at seed 42.

    Source: pytorch/pytorch issue 158398, about the later rows, beyond one launch's threads.
    """
    ours = noise_source("philox", 42).normal((1, 3, 2048))[0][:, [0, 1, 2, -3, -2, -1]]
    wanted = printed("""
         0.1940  2.1614 -0.1721  1.4540 -2.7733 -0.8932
        -0.4574  0.8063  0.1580  0.1124  0.2769 -1.2535
         1.1346 -0.6329 -0.9147 -1.0001 -1.1552 -0.6955
    """)
    np.testing.assert_allclose(ours.ravel(), wanted, rtol=0, atol=5.1e-5)


def test_philox_reads_both_words_of_a_seed() -> None:
    low, high = noise_source("philox", 42), noise_source("philox", 2**32 + 42)
    assert not np.array_equal(low.normal((4,)), high.normal((4,)))


@pytest.mark.parametrize("rng", ["torch", "philox"])
def test_numbers_are_standard_normal(rng: Rng) -> None:
    values = noise_source(rng, 3).normal((1 << 18,)).astype(np.float64)
    error = 1 / math.sqrt(values.size)
    assert abs(values.mean()) < 4 * error
    assert abs(values.std() - 1) < 4 * error
    assert abs((np.abs(values) < 1).mean() - 0.682689) < 4 * error
    assert np.isfinite(values).all()


@pytest.mark.parametrize(
    ("rng", "seed", "message"),
    [
        ("torch", -1, "from 0 to 2**64 - 1"),
        ("philox", 2**64, "from 0 to 2**64 - 1"),
        ("torch", 1.5, "whole number"),
        ("mt19937", 0, "one of torch, philox"),
    ],
)
def test_what_cannot_be_drawn_is_refused(rng: Any, seed: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        noise_source(rng, seed)
    assert message in str(caught.value)
