"""The self-test's bounds are above the error of FP16 arithmetic, and below that of mistakes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sld_edge.benchmarks.studies.fp16_error import (
    arithmetic_errors,
    bias_effects,
    exchange_effect,
    picture_errors,
)
from sld_edge.runtime.bundle import Bundle
from sld_edge.runtime.selftest import pictures
from sld_edge.runtime.selftest.miniature import unpack
from sld_edge.runtime.selftest.tolerances import BOUNDS, tolerance

FP16 = BOUNDS["fp16"]


@pytest.fixture(scope="module")
def fp16(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bounds") / "fp16"
    unpack("fp16", folder)
    return Bundle.open(folder)


def test_arithmetic_stays_well_below_the_bounds(fp16: Bundle) -> None:
    errors = arithmetic_errors(fp16, seeds=range(2))
    for name in ("text_encoder.hidden_states", "unet.noise_pred", "unet.deep"):
        assert 1e-5 < errors.largest(name) < FP16.network / 3, name
    assert errors.largest("vae_decoder.images") < FP16.levels / 10


def test_mistakes_are_well_above_the_bounds(bundle_copy: Path) -> None:
    # A copy: onnx refuses weights with a second link, as other tests make them.
    bundle = Bundle.open(bundle_copy)
    assert exchange_effect() > 100 * FP16.network
    effects = np.array(list(bias_effects(bundle, "text_encoder").values()))
    assert np.mean(effects > FP16.network) > 0.8  # the others are close to zero
    assert np.median(effects) > 5 * FP16.network


def test_pictures_differ_less_than_their_bound(
    fp16: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sld_edge.benchmarks.studies.fp16_error.IMAGES", pictures.IMAGES[4:5])
    errors = picture_errors(fp16)
    assert 0 < errors["levels"] < FP16.image_levels / 4
    assert errors["share"] < FP16.share / 4


def test_the_bounds_of_a_provider() -> None:
    assert tolerance("fp16", "cpu") is tolerance("fp16", "tensorrt") is BOUNDS["fp16"]
    assert tolerance("fp32", "tensorrt").network == 1e-4  # plans switch TF32 off
    assert tolerance("fp32", "ort-tensorrt") is BOUNDS["tf32"]
    assert FP16.times(2).network == 2 * FP16.network
    assert FP16.times(2).guidance == FP16.guidance
