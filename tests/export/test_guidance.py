from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from oracles.guidance import guidance
from oracles.running import outputs_of
from sld_edge.export.graphs.guidance import write_guidance

Array = np.ndarray[Any, Any]

B, H, W, N = 3, 4, 5, 3
# A few FP32 roundings; |d| * scale multiplies that of d by up to 5000, so mu has its own.
TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("guidance") / "guidance.onnx"
    write_guidance(path)
    return path


@pytest.fixture
def feeds() -> dict[str, Array]:
    rng = np.random.default_rng(7)

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape, np.float32)

    # Multiples of 1/64 subtract without rounding: d is exactly the threshold where it should be.
    text = np.round(normal(B, 4, H, W) * 64) / 64
    d = np.round(normal(B, 4, H, W) * 8) / 64
    thresholds = np.array([0.0, 1 / 64, 0.25])
    assert all((d[i] == thresholds[i]).any() for i in range(B))
    return {
        "noise_pred_uncond": normal(B, 4, H, W),
        "noise_pred_text": text.astype(np.float32),
        "noise_pred_safety": (text - d).astype(np.float32)[None],
        "latents": normal(B, 4, H, W),
        "momentum": normal(B, 4, H, W),
        "history": normal(4, B, 4, H, W),
        "noise": normal(B, 4, H, W),
        "edit_map": np.abs(normal(B, H, W)),
        "row": np.append(normal(10), np.float32(1)),
        "guidance_scale": np.array([7.5, 1.0, 3.0], np.float32),
        "safety": np.array(
            [[10, 0, 0.3, 0.4, 1], [4, 1 / 64, 0.5, 0.7, 0], [2, 0.25, 0, 0, 1]], np.float32
        ),
    }


@pytest.fixture
def several(feeds: dict[str, Array]) -> dict[str, Array]:
    """Three concepts that disagree; where all are one, the first is."""
    rng = np.random.default_rng(8)
    first = feeds["noise_pred_safety"]
    others = first + np.round(rng.standard_normal((N - 1, B, 4, H, W), np.float32) * 16) / 64
    return {**feeds, "noise_pred_safety": np.concatenate([first, others.astype(np.float32)])}


def reference(feeds: dict[str, Array]) -> dict[str, Array]:
    """SLD.md, section 1, image by image in float64, and a row of the sampler's table.

    The UNet's output times `unit` is noise, up to what all branches share.
    """
    f = {name: array.astype(np.float64) for name, array in feeds.items()}
    p, q, a, *b, s, c_in, unit = f["row"]
    out: dict[str, list[Any]] = {}
    for i in range(B):
        scale, threshold, momentum_scale, momentum_beta, active = f["safety"][i]
        guidance_scale = f["guidance_scale"][i]
        eps_u, eps_p = (f[f"noise_pred_{name}"][i] for name in ("uncond", "text"))
        nu, x = f["momentum"][i], f["latents"][i]
        g = eps_p - eps_u
        plain = eps_u + guidance_scale * g
        gates, pushes = [], []
        for eps_s in f["noise_pred_safety"][:, i]:
            d = unit * (eps_p - eps_s)
            mu = np.minimum(np.abs(d) * scale, 1)
            mu[d >= threshold] = 0
            gates.append(mu)
            pushes.append(mu * unit * (eps_s - eps_u))
        push = np.zeros_like(eps_u)
        for at in np.ndindex(push.shape):
            push[at] = max((own[at] for own in pushes), key=lambda x: (abs(x), x))
        gam = push + momentum_scale * nu
        nu = momentum_beta * nu + (1 - momentum_beta) * gam
        if active:
            g = g - gam / unit
        eps = eps_u + guidance_scale * g
        edit = guidance_scale * gam / unit if active else np.zeros_like(gam)
        m = p * x + q * eps
        kept = [m, *f["history"][:, i]]
        following = a * x + sum(bj * mj for bj, mj in zip(b, kept, strict=True))
        following = following + s * f["noise"][i]
        norm = np.linalg.norm(plain)
        for name, value in {
            "latents_next": following,
            "unet_latents": c_in * following,
            "momentum_next": nu,
            "history_next": np.stack(kept[:4]),
            "edit_map_next": f["edit_map"][i] + np.abs(edit).mean(axis=0),
            "share": np.mean(np.any([mu > 0 for mu in gates], axis=0)) if active else 0.0,
            "strength": np.linalg.norm(edit) / norm if norm else 0.0,
            "concept_strength": np.array(
                [
                    guidance_scale * active * np.linalg.norm(own / unit) / norm if norm else 0.0
                    for own in pushes
                ]
            ),
            "finite": 1.0,
        }.items():
            out.setdefault(name, []).append(value)
    stacked = {name: np.stack(values) for name, values in out.items()}
    for name in ("history_next", "concept_strength"):
        stacked[name] = stacked[name].swapaxes(0, 1)
    return stacked


def assert_close(got: dict[str, Array], wanted: dict[str, Array]) -> None:
    assert set(got) == set(wanted)
    for name, array in got.items():
        assert array.dtype == np.float32, name
        assert array.shape == wanted[name].shape, name
        largest = max(1.0, float(np.abs(wanted[name]).max()))
        np.testing.assert_allclose(
            array, wanted[name], rtol=0, atol=TOLERANCE * largest, err_msg=name
        )


def test_is_the_method_in_onnx_runtime(path: Path, feeds: dict[str, Array]) -> None:
    assert_close(outputs_of(path, feeds), reference(feeds))


def test_is_the_method_in_the_reference_evaluator(path: Path, feeds: dict[str, Array]) -> None:
    evaluator = ReferenceEvaluator(onnx.load(path))
    got = dict(zip(evaluator.output_names, evaluator.run(None, feeds), strict=True))
    assert_close({name: np.asarray(array) for name, array in got.items()}, reference(feeds))


def test_several_concepts(several: dict[str, Array], path: Path) -> None:
    wanted = reference(several)
    assert wanted["concept_strength"].shape == (N, B)
    evaluator = ReferenceEvaluator(onnx.load(path))
    got = dict(zip(evaluator.output_names, evaluator.run(None, several), strict=True))
    assert_close({name: np.asarray(array) for name, array in got.items()}, wanted)
    assert_close(outputs_of(path, several), wanted)
    twin = guidance({name: array.astype(np.float64) for name, array in several.items()})
    assert_close({name: array.astype(np.float32) for name, array in twin.items()}, wanted)


@pytest.mark.parametrize("unit", [0.25, 0.068, -4.0])
def test_outputs_in_other_units_than_noise(
    several: dict[str, Array], path: Path, unit: float
) -> None:
    several["row"][-1] = unit
    assert_close(outputs_of(path, several), reference(several))


@pytest.mark.parametrize("unit", [0.25, 4.0, -0.5])
def test_a_unit_changes_nothing_but_the_scale_of_the_outputs(
    several: dict[str, Array], path: Path, unit: float
) -> None:
    """Predictions divided by the unit are the same noise, so the next latents are the same."""
    several["row"][:4] = 0, 1, 0, 1  # the next latents are the guided prediction
    several["row"][4:9] = 0
    noise = outputs_of(path, several)
    other = {name: several[name] / np.float32(unit) for name in PREDICTIONS}
    got = outputs_of(
        path, {**several, **other, "row": np.append(several["row"][:-1], unit).astype(np.float32)}
    )
    for name in ("momentum_next", "share", "strength", "concept_strength"):
        np.testing.assert_allclose(got[name], noise[name], rtol=1e-5, atol=1e-6, err_msg=name)
    moved = got["latents_next"] * np.float32(unit)
    np.testing.assert_allclose(moved, noise["latents_next"], rtol=1e-5, atol=1e-5)


def test_a_concept_given_twice_acts_once(path: Path, feeds: dict[str, Array]) -> None:
    once = outputs_of(path, feeds)
    twice = np.concatenate([feeds["noise_pred_safety"]] * 2)
    got = outputs_of(path, {**feeds, "noise_pred_safety": twice})
    for name in set(once) - {"concept_strength"}:
        np.testing.assert_array_equal(got[name], once[name], err_msg=name)
    np.testing.assert_array_equal(got["concept_strength"], [once["concept_strength"][0]] * 2)


def test_the_order_of_concepts_does_not_matter(path: Path, several: dict[str, Array]) -> None:
    one = outputs_of(path, several)
    several["noise_pred_safety"] = several["noise_pred_safety"][::-1].copy()
    other = outputs_of(path, several)
    np.testing.assert_array_equal(one["latents_next"], other["latents_next"])
    np.testing.assert_array_equal(one["concept_strength"], other["concept_strength"][::-1])


def test_the_edit_is_there_at_all(feeds: dict[str, Array]) -> None:
    wanted = reference(feeds)
    assert wanted["share"].tolist()[1] == 0
    assert 0.1 < wanted["share"][0] < 0.9
    assert wanted["strength"][0] > 0.1


def test_at_the_threshold_nothing_is_edited(path: Path, feeds: dict[str, Array]) -> None:
    feeds["momentum"] = np.zeros_like(feeds["momentum"])
    feeds["noise_pred_text"] = feeds["noise_pred_safety"][0] + np.float32(0.25)
    feeds["safety"] = np.array([[1000, 0.25, 0.3, 0.4, 1]] * B, np.float32)
    feeds["noise_pred_safety"] = np.round(feeds["noise_pred_safety"] * 4) / 4
    feeds["noise_pred_text"] = feeds["noise_pred_safety"][0] + np.float32(0.25)
    got = outputs_of(path, feeds)
    assert (got["share"] == 0).all()
    assert (got["strength"] == 0).all()
    feeds["noise_pred_text"] -= np.float32(1 / 64)
    assert (outputs_of(path, feeds)["share"] == 1).all()


@pytest.mark.parametrize("preset", [(200, 0, 0, 0), (1000, 0.01, 0.3, 0.4), (5000, 1, 0.5, 0.7)])
def test_presets(path: Path, feeds: dict[str, Array], preset: tuple[float, ...]) -> None:
    feeds["safety"] = np.array([[*preset, active] for active in (0, 1, 1)], np.float32)
    assert_close(outputs_of(path, feeds), reference(feeds))


def test_branches_that_were_not_computed(path: Path, feeds: dict[str, Array]) -> None:
    feeds["momentum"] = np.zeros_like(feeds["momentum"])
    feeds["noise_pred_safety"] = feeds["noise_pred_uncond"][None]
    feeds["safety"][:, 4] = 0
    assert_close(outputs_of(path, feeds), reference(feeds))
    feeds["noise_pred_uncond"] = feeds["noise_pred_text"]
    feeds["noise_pred_safety"] = feeds["noise_pred_text"][None]
    feeds["row"] = np.array([0, 1, 0, 1, 0, 0, 0, 0, 0, 1, 1], np.float32)
    got = outputs_of(path, feeds)
    np.testing.assert_array_equal(got["latents_next"], feeds["noise_pred_text"])
    assert (got["share"] == 0).all()


PREDICTIONS = ("noise_pred_uncond", "noise_pred_text", "noise_pred_safety")


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [*PREDICTIONS, "latents", "momentum", "noise", "history"])
@pytest.mark.parametrize("image", range(B))
def test_says_which_image_is_not_finite_and_whose_fault_it_is(
    path: Path, several: dict[str, Array], name: str, image: int, number: float
) -> None:
    feeds = several
    feeds["safety"][:, 4] = 1  # else momentum does not reach the latents
    feeds["safety"][:, 2] = 0.5
    place = (*[1] * (feeds[name].ndim - 4), image, 2, 3, 4)
    feeds[name][place] = number
    wanted = [1.0] * B
    wanted[image] = -1.0 if name in PREDICTIONS else 0.0
    assert outputs_of(path, feeds)["finite"].tolist() == wanted
    with np.errstate(invalid="ignore"):
        assert guidance(feeds)["finite"].tolist() == wanted


def test_a_prediction_that_the_step_hides_is_found(path: Path, feeds: dict[str, Array]) -> None:
    feeds["row"] = np.array([0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 1], np.float32)
    feeds["noise_pred_text"][0, 0, 0, 0] = np.finfo(np.float32).max  # the largest is finite
    feeds["guidance_scale"][:] = 1
    feeds["noise_pred_uncond"][0] = 0
    feeds["safety"][:, 4] = 0
    assert outputs_of(path, feeds)["finite"].tolist() == [1, 1, 1]
    feeds["noise_pred_safety"][0, 2, 0, 0, 0] = -np.inf
    assert outputs_of(path, feeds)["finite"].tolist() == [1, 1, -1]


def test_nothing_to_compare_with_gives_strength_0(path: Path, feeds: dict[str, Array]) -> None:
    feeds["noise_pred_uncond"] = np.zeros_like(feeds["noise_pred_uncond"])
    feeds["noise_pred_text"] = np.zeros_like(feeds["noise_pred_text"])
    assert (outputs_of(path, feeds)["strength"] == 0).all()


def test_is_one_file_that_never_changes(path: Path, tmp_path: Path) -> None:
    write_guidance(tmp_path / "guidance.onnx")
    assert (tmp_path / "guidance.onnx").read_bytes() == path.read_bytes()
    assert [each.name for each in tmp_path.iterdir()] == ["guidance.onnx"]
    assert onnx.load(path).opset_import[0].version == 20
