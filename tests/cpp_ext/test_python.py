"""The Python function: its errors, the same with and without native code, and the stub."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from re import escape
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import sld_edge.cpp_ext as cpp_ext
from sld_edge.cpp_ext import HAVE_NATIVE, empty_outputs, safe_step

Array = NDArray[Any]
Feeds = dict[str, Array]
Make = Callable[..., Feeds]

CPP = Path(__file__).parents[2] / "cpp_ext"
SIZES = {"B": 2, "n": 1, "h": 5, "w": 7}
needs_native = pytest.mark.skipif(not HAVE_NATIVE, reason="the native module is not built here")


@pytest.fixture(params=["native", "numpy"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "numpy":
        monkeypatch.setattr(cpp_ext, "HAVE_NATIVE", False)
    elif not HAVE_NATIVE:
        pytest.skip("the native module is not built here")


def broken(feeds: Feeds, name: str, how: str) -> Array:
    array = feeds[name]
    if how == "a size":
        return np.concatenate([array, array], axis=-1)
    if how == "an axis":
        return array[None]
    if how == "the layout":
        return np.asfortranarray(array)
    return array.astype(how)


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("latents", "float64", "latents | got float64 [2, 4, 5, 7] | expected float32 [B=2, 4"),
        ("noise_pred_text", "float16", "noise_pred_text | got float16"),
        ("noise_pred_safety", "an axis", "expected float32 [n, B=2, 4, h=5, w=7]"),
        ("history", "a size", "got float32 [4, 2, 4, 5, 14] | expected float32 [4, B=2, 4, h=5"),
        ("edit_map", "the layout", "got float32 [2, 5, 7], not C-contiguous"),
        ("row", "a size", "expected float32 [11]"),
        ("guidance_scale", "a size", "expected float32 [B=2]"),
        ("safety", "a size", "expected float32 [B=2, 5]"),
    ],
)
def test_an_input_that_does_not_fit(make_feeds: Make, name: str, how: str, message: str) -> None:
    feeds = make_feeds()
    feeds[name] = broken(feeds, name, how)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is compared below
        safe_step(feeds)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("either")
def test_other_mistakes(make_feeds: Make) -> None:
    feeds = make_feeds()
    with pytest.raises(ValueError, match=escape("threads | got 0 | expected 1 to 1024")):
        safe_step(feeds, threads=0)
    with pytest.raises(
        ValueError, match=escape("inputs of a step | got missing [], unknown ['extra']")
    ):
        safe_step({**feeds, "extra": feeds["row"]})
    with pytest.raises(ValueError, match=escape("got missing ['row'], unknown []")):
        safe_step({name: array for name, array in feeds.items() if name != "row"})
    with pytest.raises(ValueError, match="n at most 64"):
        safe_step(make_feeds(1, 65, 1, 1))
    with pytest.raises(ValueError, match="1 or more"):
        safe_step(make_feeds(2, 1, 0, 3))


@pytest.mark.usefixtures("either")
def test_outputs_can_be_given(make_feeds: Make) -> None:
    feeds = make_feeds()
    out = empty_outputs(SIZES)
    got = safe_step(feeds, out=out)
    for name, array in safe_step(feeds).items():
        assert got[name] is out[name]
        np.testing.assert_array_equal(got[name], array, err_msg=name)


@pytest.mark.usefixtures("either")
def test_outputs_that_do_not_fit(make_feeds: Make) -> None:
    feeds = make_feeds()
    for name, array, message in (
        ("latents_next", feeds["latents"], "its own memory"),
        ("share", np.empty(3, np.float32), "share | got float32 [3] | expected float32 [B=2]"),
        ("finite", np.empty(2), "finite | got float64"),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is compared below
            safe_step(feeds, out={**empty_outputs(SIZES), name: array})
        assert message in str(caught.value)
    out = empty_outputs(SIZES)
    with pytest.raises(ValueError, match="its own memory"):
        safe_step(feeds, out={**out, "strength": out["share"]})
    out["momentum_next"].flags.writeable = False
    with pytest.raises(ValueError, match=escape("momentum_next | got a read-only array")):
        safe_step(feeds, out=out)


def test_native_and_numpy_agree(make_feeds: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit where no numbers are summed: the order of operations is the same."""
    feeds = make_feeds(3, 2)
    native = safe_step(feeds, threads=2)
    monkeypatch.setattr(cpp_ext, "HAVE_NATIVE", False)
    for name, array in safe_step(feeds).items():
        rtol = 0 if array.ndim > 2 else 1e-6
        np.testing.assert_allclose(native[name], array, rtol=rtol, atol=0, err_msg=name)


@needs_native
def test_the_native_signature_is_a_check(make_feeds: Make) -> None:
    """Without the checks in Python: wrong types and layouts are TypeErrors, shapes ValueErrors."""
    import sld_edge.cpp_ext._kernels as _kernels

    for name, how, error in (
        ("latents", "float64", TypeError),
        ("noise_pred_text", "float16", TypeError),
        ("noise_pred_uncond", "float64", TypeError),
        ("momentum", "the layout", TypeError),
        ("noise_pred_safety", "an axis", ValueError),
        ("latents", "an axis", ValueError),
        ("row", "a size", ValueError),
        ("history", "a size", ValueError),
        ("guidance_scale", "a size", ValueError),
        ("edit_map", "a size", ValueError),
    ):
        feeds = make_feeds()
        feeds[name] = broken(feeds, name, how)
        with pytest.raises(error):
            _kernels.safe_step(**feeds, **empty_outputs(SIZES), threads=1)
    feeds = make_feeds()
    outputs = {**empty_outputs(SIZES), "latents_next": feeds["latents"]}
    with pytest.raises(ValueError, match="an output overlaps"):
        _kernels.safe_step(**feeds, **outputs, threads=1)


@needs_native
def test_the_stub_is_what_stubgen_makes(tmp_path: Path) -> None:
    for package in ("nanobind", "ruff"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    stub = tmp_path / "_kernels.pyi"
    make = ["nanobind.stubgen", "-q", "-m", "sld_edge.cpp_ext._kernels", "-o", str(stub)]
    config = str(CPP.parent / "pyproject.toml")
    for command in (make, ["ruff", "format", "-q", "--config", config, str(stub)]):
        subprocess.run([sys.executable, "-m", *command], check=True, capture_output=True)
    assert stub.read_text() == (CPP / "_kernels.pyi").read_text()
