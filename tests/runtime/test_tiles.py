"""Pictures decoded in tiles: against the whole decode, and against diffusers' tiles."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from oracles.models import config_of, tiny_vae, weights_of
from sld_edge.engines.onnxruntime.engine import OrtEngine
from sld_edge.export.graphs.builder import GraphOptions
from sld_edge.export.graphs.vae import write_vae_decoder
from sld_edge.runtime import InputError, Pipeline
from sld_edge.runtime.picture import psnr
from sld_edge.runtime.tiles import Tiling, _spans, checked_tiling, tiling_for


def local(latents: NDArray[np.float32]) -> NDArray[np.uint8]:
    """A decoder that looks at one cell for each pixel: tiles can change nothing."""
    pixels = latents[:, :3].transpose(0, 2, 3, 1).repeat(2, axis=1).repeat(2, axis=2)
    return pixels.astype(np.uint8)


def levels(height: int, width: int) -> NDArray[np.float32]:
    shape = (1, 4, height, width)
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.float32)


@pytest.mark.parametrize("side", [4, 5, 16, 64])
def test_spans_cover_a_length_evenly_and_overlap(side: int) -> None:
    for length in range(1, 5 * side):
        spans = _spans(length, side)
        assert (spans[0][0], spans[-1][1]) == (0, length)
        assert {end - start for start, end in spans} == {min(side, length)}
        overlaps = [a[1] - b[0] for a, b in pairwise(spans)]
        assert min(overlaps, default=side) >= side // 4
        # One fewer would not do.
        assert len(spans) == 1 or length > (len(spans) - 1) * (side - side // 4) + side // 4


@pytest.mark.parametrize("size", [(8, 8), (9, 8), (8, 30), (13, 21), (30, 31)])
def test_a_decoder_without_neighbours_gives_the_whole_picture(size: tuple[int, int]) -> None:
    latents = levels(*size)
    got = Tiling(sides=(8, 8)).decoded(local, latents)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, local(latents))


def test_tiles_are_of_one_size_and_few() -> None:
    seen = []

    def watched(latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        assert latents.flags.c_contiguous
        seen.append(latents.shape)
        return local(latents)

    Tiling(sides=(8, 12)).decoded(watched, levels(14, 40))
    assert seen == [(1, 4, 8, 12)] * 2 * 5


def test_a_step_between_tiles_becomes_a_ramp() -> None:
    brightness = iter((0, 160))

    def flat(latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        return np.full((1, 16, 16, 3), next(brightness), np.uint8)

    row = Tiling(sides=(8, 8)).decoded(flat, levels(8, 14))[0, 0, :, 0].astype(int)
    # Two cells overlap, 4 pixels: 1/8, 3/8, 5/8 and 7/8 of the way.
    assert row.tolist() == [0] * 12 + [20, 60, 100, 140] + [160] * 12


def test_tiles_are_those_of_diffusers(tmp_path: Path) -> None:
    model = tiny_vae()
    write_vae_decoder(
        config_of(model),
        weights_of(model, tmp_path / "vae.safetensors", name="vae"),
        GraphOptions(),
        tmp_path / "vae.onnx",
    )
    factor = 2 ** (len(model.config.block_out_channels) - 1)
    engine = OrtEngine(tmp_path / "vae.onnx")

    def decode(latents: NDArray[np.float32]) -> NDArray[np.uint8]:
        images: NDArray[np.uint8] = engine.run({"latents": latents})["images"]
        return images

    # Two tiles a side that overlap by a quarter: so cuts diffusers, up to 12 of the 14 cells.
    latents = np.random.default_rng(1).standard_normal((1, 4, 14, 14), np.float32) * 0.18215
    model.enable_tiling()
    model.tile_latent_min_size, model.tile_sample_min_size = 8, 8 * factor
    scaled = torch.from_numpy(latents) / model.config.scaling_factor
    with torch.no_grad():
        sample = model.tiled_decode(scaled).sample
    theirs = ((sample / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    ours = Tiling(sides=(8, 8)).decoded(decode, latents)
    same = np.s_[:, : 12 * factor, : 12 * factor]
    difference = np.abs(ours.astype(float) - theirs)[same]
    # Their ramp starts half a pixel earlier and is clipped after, not before.
    whole = np.abs(decode(latents).astype(float) - theirs)[same]
    assert difference.mean() < 1
    assert difference.mean() < whole.mean() / 10
    alone = np.r_[: 6 * factor, 8 * factor : 12 * factor]  # pixels of one tile only
    assert difference[:, alone][:, :, alone].max() <= 1


def test_the_miniature_in_tiles_is_close_to_whole(
    miniature: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sld_edge.runtime.tiles._SIDE", 16)  # as the miniature was trained
    latents = miniature("a red star", steps=4, sampler="ddim", width=112, height=100).latents
    whole = miniature.decode(latents)
    with Pipeline.load(provider="cpu", vae_tiling="on") as tiled:
        got = tiled.decode(latents)
        assert got.shape == whole.shape == (1, 100, 112, 3)
        assert 30 < psnr(got, whole) < 60
        small = latents[:, :, :16, :16]
        np.testing.assert_array_equal(tiled.decode(small), miniature.decode(small))


def test_when_there_are_tiles_and_of_what_size() -> None:
    assert tiling_for("auto", 96, 96) is tiling_for("auto", 64, 144) is None
    for size, sides in {
        (97, 96): (56, 56),  # two by two
        (128, 128): (76, 76),
        (64, 192): (64, 80),  # whole by three
        (256, 8192): (80, 80),
    }.items():
        tiling = tiling_for("auto", *size)
        assert tiling is not None
        assert tiling.sides == sides
    assert tiling_for("on", 8, 8) == Tiling(sides=(8, 8))
    assert tiling_for("off", 999, 999) is None
    shapes = [(1, 4, 32, 80), (1, 4, 64, 80), (4, 4, 48, 128)]
    assert tiling_for("on", 96, 96, shapes) == Tiling(sides=(48, 80))  # type: ignore[arg-type]  # a list
    with pytest.raises(InputError, match="vae tiling | got 'never' | expected auto, on, off"):
        checked_tiling("never")
