"""The step on the CPU, and the CUDA kernels as loops, against the guidance graph in ONNX Runtime.

Both work in FP32 in the same order, so elements differ only where ONNX Runtime fuses a
multiplication into an addition, and figures by the order of their sums: 1e-6 of the largest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnxruntime
import pytest

from c_library import Feeds, Step
from oracles.guidance import guidance
from sld_edge.export.graphs.guidance import write_guidance
from sld_edge.runtime.contract import OUTPUTS
from sld_edge.runtime.safety import PRESETS
from sld_edge.runtime.samplers import SAMPLERS, sampler_table

Make = Callable[..., Feeds]

TOLERANCE = 1e-6
_RANDOM = np.random.default_rng(3)
UNITS = (1.0, *_RANDOM.uniform(0.1, 2, 2).round(3), *_RANDOM.uniform(-2, -0.1, 2).round(3))
WHOLE = ("latents_next", "unet_latents", "momentum_next", "history_next", "edit_map_next")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Step:
    path = tmp_path_factory.mktemp("graph") / "guidance.onnx"
    write_guidance(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)

    def run(feeds: Feeds) -> Feeds:
        wide = {name: array.astype(np.float32) for name, array in feeds.items()}
        return dict(zip(OUTPUTS, session.run(list(OUTPUTS), wide), strict=True))

    return run


@pytest.fixture(params=["cpu", "cuda-body"])
def step(request: pytest.FixtureRequest, c_step: Step) -> Step:
    """One implementation: feeds in, outputs out."""
    return partial(c_step, cuda=request.param == "cuda-body")


def assert_close(got: Feeds, wanted: Feeds) -> None:
    assert set(got) == set(wanted)
    for name, array in got.items():
        assert array.dtype == np.float32, name
        assert array.shape == wanted[name].shape, name
        largest = float(np.abs(wanted[name]).max())
        np.testing.assert_allclose(
            array, wanted[name], rtol=0, atol=TOLERANCE * largest, err_msg=name
        )


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("concepts", [1, 2, 3])
def test_is_the_graph(
    step: Step, graph: Step, make_feeds: Make, concepts: int, half: bool, unit: float
) -> None:
    feeds = make_feeds(4, concepts, half=half, unit=unit)
    got = step(feeds)
    assert_close(got, graph(feeds))
    assert 0.1 < got["share"][0] < 1
    assert (got["concept_strength"][:, 0] > 0.1).all()
    assert got["share"][3] == got["strength"][3] == 0


@pytest.mark.parametrize("images", range(1, 9))
def test_any_number_of_images(step: Step, graph: Step, make_feeds: Make, images: int) -> None:
    feeds = make_feeds(images, 2)
    assert_close(step(feeds), graph(feeds))


@pytest.mark.parametrize("size", [(1, 1), (1, 17), (3, 43), (16, 16), (13, 79), (64, 64)])
def test_any_size(step: Step, graph: Step, make_feeds: Make, size: tuple[int, int]) -> None:
    """Figures against float64: ONNX Runtime adds 16384 squares up one by one, to 4e-5."""
    feeds = make_feeds(2, 2, *size)
    exact = guidance({name: array.astype(np.float64) for name, array in feeds.items()})
    elements = graph(feeds)
    wanted = {name: elements[name] if name in WHOLE else exact[name] for name in exact}
    assert_close(step(feeds), wanted)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(step: Step, graph: Step, make_feeds: Make, preset: str) -> None:
    safety = PRESETS[preset]
    numbers = (safety.scale, safety.threshold, safety.momentum_scale, safety.momentum_beta)
    feeds = make_feeds(2, 2)
    feeds["safety"] = np.array([[*numbers, active] for active in (0, 1)], np.float32)
    assert_close(step(feeds), graph(feeds))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_every_row_of_a_run_of_a_sampler(
    step: Step, graph: Step, make_feeds: Make, sampler: str, prediction: str
) -> None:
    """A whole run: each call continues from its own last call, so a wrong history would grow."""
    feeds = make_feeds(2, 2)
    feeds["history"] = np.zeros_like(feeds["history"])
    ours = graphs = feeds
    for index, row in enumerate(sampler_table(sampler, {"prediction_type": prediction}, 6).rows()):
        fresh = make_feeds(2, 2, seed=index)
        new = {name: fresh[name] for name in fresh if name.startswith("noise")} | {"row": row}
        got, wanted = step({**ours, **new}), graph({**graphs, **new})
        for name in WHOLE:
            error = np.abs(got[name] - wanted[name]).max()
            assert error <= 4e-6 * np.abs(wanted[name]).max(), (index, name)  # of all calls so far
        ours, graphs = (
            {
                **feeds,
                **{key: out[f"{key}_next"] for key in ("latents", "momentum", "history")},
                "edit_map": out["edit_map_next"],
            }
            for out in (got, wanted)
        )


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads_change_nothing(c_step: Step, make_feeds: Make, threads: int, half: bool) -> None:
    feeds = make_feeds(3, 2, 30, 41, half=half)
    one, many = (c_step(feeds, threads=count, cuda=False) for count in (1, threads))
    for name, array in one.items():
        np.testing.assert_array_equal(many[name], array, err_msg=name)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("noise_pred_uncond", -1),
        ("noise_pred_text", -1),
        ("noise_pred_safety", -1),
        ("latents", 0),
        ("momentum", 0),
        ("noise", 0),
        ("history", 0),
    ],
)
def test_says_which_image_is_not_finite(
    step: Step, graph: Step, make_feeds: Make, name: str, code: int, number: float
) -> None:
    for image in range(3):
        feeds = make_feeds(3, 2)
        feeds[name][..., image, 2, 3, 4] = number
        wanted = [1.0] * 3
        wanted[image] = code
        assert graph(feeds)["finite"].tolist() == wanted
        assert step(feeds)["finite"].tolist() == wanted


@pytest.mark.parametrize("concept", [0, 1])
def test_a_step_that_overflows_is_not_finite(step: Step, make_feeds: Make, concept: int) -> None:
    """All predictions are finite, one concept's difference is not, and the gate would hide it."""
    feeds = make_feeds(1, 2)
    largest = np.finfo(np.float32).max
    feeds["noise_pred_uncond"][0, 0, 0, 0] = -largest
    feeds["noise_pred_safety"][:, 0, 0, 0, 0] = 0
    feeds["noise_pred_safety"][concept, 0, 0, 0, 0] = largest / 2
    feeds["noise_pred_text"][0, 0, 0, 0] = 0  # the plain guidance stays finite
    feeds["guidance_scale"][:] = 1
    feeds["safety"][0, :2] = 0
    assert step(feeds)["finite"].tolist() == [0]


def test_nothing_to_compare_with_gives_strength_0(step: Step, make_feeds: Make) -> None:
    feeds = make_feeds(2, 2)
    for name in ("noise_pred_uncond", "noise_pred_text"):
        feeds[name] = np.zeros_like(feeds[name])
    got = step(feeds)
    assert (got["strength"] == 0).all()
    assert (got["concept_strength"] == 0).all()


@pytest.mark.parametrize("unit", [0.5, -0.5])
@pytest.mark.parametrize("signs", [(1, -1), (-1, 1)])
def test_of_opposite_edits_of_one_size_the_positive_counts(
    step: Step, graph: Step, make_feeds: Make, signs: tuple[int, int], unit: float
) -> None:
    feeds = make_feeds(1, 2, unit=unit)
    feeds["noise_pred_uncond"][:] = 0
    feeds["noise_pred_text"][:] = -4 * np.sign(unit)  # d is below the threshold for both
    feeds["noise_pred_safety"][:] = np.reshape(signs, (2, 1, 1, 1, 1))
    feeds["momentum"][:] = 0
    got = step(feeds)
    assert (got["momentum_next"] > 0).all()
    assert_close(got, graph(feeds))


def test_branches_may_be_one_array(step: Step, graph: Step, make_feeds: Make) -> None:
    feeds = make_feeds(2, 1)
    feeds["noise_pred_uncond"] = feeds["noise_pred_text"]
    feeds["noise_pred_safety"] = feeds["noise_pred_text"][None]
    feeds["safety"][:, 4] = 0
    assert_close(step(feeds), graph(feeds))
