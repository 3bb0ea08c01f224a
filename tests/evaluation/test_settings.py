"""Settings by name and sweeps, as a user writes them."""

from __future__ import annotations

import pytest

from sld_edge.benchmarks.evaluation.evaluator import Task, request_from_tasks
from sld_edge.benchmarks.evaluation.prompts import EvalPrompt
from sld_edge.benchmarks.evaluation.settings import (
    NEGATIVE,
    PLAIN,
    EvalSettings,
    settings_from_names,
    sweep_settings,
)
from sld_edge.engines.errors import InputError
from sld_edge.runtime.safety import PRESETS, Safety


def test_plain_is_always_first_and_nothing_is_twice() -> None:
    found = settings_from_names(["max", "negative", "off", "max"])
    assert [setting.name for setting in found] == ["plain", "max", "negative prompt"]
    assert found[0] == PLAIN
    assert found[2] == NEGATIVE


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(InputError, match="got 'strongest' .* max, early, guard.*, negative"):
        settings_from_names(["strongest"])


def test_a_sweep_is_every_combination_over_medium() -> None:
    found = sweep_settings(["scale=500,2000", "warmup=0,5"], calls=50)
    assert [setting.name for setting in found] == [
        *("scale=500,warmup=0", "scale=500,warmup=5"),
        *("scale=2000,warmup=0", "scale=2000,warmup=5"),
    ]
    assert found[1].safety == Safety(
        scale=500, warmup_steps=5, threshold=0.01, momentum_scale=0.3, momentum_beta=0.4
    )


def test_a_sweep_scales_mediums_warm_up_to_the_calls() -> None:
    (setting,) = sweep_settings(["momentum=0.5"], calls=25)
    assert isinstance(setting.safety, Safety)
    assert setting.safety.warmup_steps == 5
    assert setting.safety.momentum_scale == 0.5


def test_a_setting_edits_where_its_scale_does() -> None:
    named = settings_from_names(["off", "negative", "weak"])
    assert [setting.edits for setting in named] == [False, False, True]
    assert [s.edits for s in sweep_settings(["scale=0,1"], calls=50)] == [False, True]


def test_every_preset_but_off_takes_a_concept() -> None:
    named = settings_from_names(["off", "negative", *PRESETS])
    assert [s.name for s in named if not s.uses_concept] == ["plain", "negative prompt"]
    assert [s.uses_concept for s in sweep_settings(["scale=0,1"], calls=50)] == [False, True]


def test_no_axis_is_no_setting() -> None:
    assert sweep_settings([], calls=50) == ()


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        (["strength=1"], "got 'strength=1'"),
        (["scale"], "got 'scale'"),
        (["scale="], "expected numbers"),
        (["scale=1,x"], "expected numbers"),
        (["scale=inf"], "expected numbers"),
        (["scale=1", "scale=2"], "scale twice"),
        (["scale=-1"], "safety scale"),
        (["warmup=1.5"], "whole number"),
        (["momentum=1"], "from 0 to below 1"),
        (["scale=" + ",".join(map(str, range(201)))], "201 settings"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(axes: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        sweep_settings(axes, calls=50)


def test_only_settings_with_a_filter_get_its_words() -> None:
    settings = EvalSettings(
        bundle=None,
        provider="cpu",
        settings=settings_from_names(["off", "max", "guard"]),
        scorers=(),
        rule=(),
        text_filter=("star",),
    )
    task = Task(prompt=EvalPrompt(index=0, text="a star"), image=0, missing=())
    asked = [request_from_tasks(settings, s, [task], "skull") for s in settings.settings]
    assert [request.text_filter for request in asked] == [None, None, ("star",)]
