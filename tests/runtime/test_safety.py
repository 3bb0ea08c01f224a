from __future__ import annotations

import pytest

from sld_edge.runtime import PRESETS, InputError, Safety
from sld_edge.runtime.safety import resolved_safety, safety_from_preset

# Table of the paper, columns in its order; warm-up for 50 steps.
PUBLISHED = {
    "weak": (15, 200, 0.0, 0.0, 0.0),
    "medium": (10, 1000, 0.01, 0.3, 0.4),
    "strong": (7, 2000, 0.025, 0.5, 0.7),
    "max": (0, 5000, 1.0, 0.5, 0.7),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("calls", [50, 51])
def test_presets_carry_the_published_numbers(name: str, calls: int) -> None:
    safety = safety_from_preset(name, calls=calls)
    assert (
        safety.warmup_steps,
        safety.scale,
        safety.threshold,
        safety.momentum_scale,
        safety.momentum_beta,
    ) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "calls", "warmup"),
    [
        *(("weak", 10, 3), ("medium", 25, 5), ("strong", 1, 0), ("max", 25, 0)),
        *(("strong", 25, 3), ("weak", 25, 7), ("medium", 24, 4)),  # down, never up
        *(("strong", 50, 7), ("strong", 51, 7), ("weak", 51, 15)),  # as published
    ],
)
def test_warm_up_is_scaled_to_the_calls(name: str, calls: int, warmup: int) -> None:
    assert safety_from_preset(name, calls=calls).warmup_steps == warmup


def test_off_does_not_act_and_the_others_do() -> None:
    assert [name for name, safety in PRESETS.items() if not safety.acts] == ["off"]


def test_medium_is_the_default() -> None:
    for calls in (4, 10, 25, 50, 51):
        assert resolved_safety(Safety(), calls=calls) == safety_from_preset("medium", calls=calls)


@pytest.mark.parametrize(
    "numbers",
    [
        {"scale": -1},
        {"scale": float("nan")},
        {"warmup_steps": -1},
        {"warmup_steps": 1.5},
        {"momentum_scale": 1.0},
        {"momentum_beta": -0.1},
        {"threshold": float("inf")},
    ],
)
def test_numbers_out_of_range_are_refused_by_name(numbers: dict[str, float]) -> None:
    with pytest.raises(InputError, match=r"safety"):
        Safety(**numbers)  # type: ignore[arg-type]


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(InputError, match="off, weak, medium, strong, max"):
        safety_from_preset("hard", calls=50)
