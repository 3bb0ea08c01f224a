from __future__ import annotations

from dataclasses import replace

import pytest

from sld_edge.runtime import PRESETS, InputError, Safety
from sld_edge.runtime.safety import (
    is_as_strong,
    preset_of,
    resolved_safety,
    safety_from_preset,
)

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


class TestWindow:
    @pytest.mark.parametrize(
        ("stop", "calls", "resolved"),
        [(0.25, 25, 7), (0.25, 50, 13), (0.25, 4, 1), (0.25, 1, 1), (0.5, 9, 5), (3, 25, 3)],
    )
    def test_a_share_is_rounded_up(self, stop: float, calls: int, resolved: int) -> None:
        safety = resolved_safety(Safety(warmup_steps=0, stop_step=stop), calls=calls)
        assert safety.stop_step == resolved

    def test_edits_between_warm_up_and_stop(self) -> None:
        safety = resolved_safety(Safety(warmup_steps=2, stop_step=5), calls=9)
        assert [call for call in range(9) if safety.edits_in(call)] == [2, 3, 4]

    @pytest.mark.parametrize("value", [0, -1, 0.0, 1.5, True, "3", float("nan"), float("inf")])
    def test_what_is_no_stop(self, value: object) -> None:
        with pytest.raises(InputError, match="stop_step"):
            Safety(stop_step=value)  # type: ignore[arg-type]

    def test_a_stop_before_the_warm_up_ends(self) -> None:
        with pytest.raises(InputError, match="stops before it begins"):
            resolved_safety(Safety(warmup_steps=3, stop_step=3), calls=9)

    @pytest.mark.parametrize("calls", [1, 2, 3, 4, 8, 25, 50, 51, 1000])
    def test_every_preset_resolves_and_is_found_again(self, calls: int) -> None:
        for name in PRESETS:
            assert preset_of(safety_from_preset(name, calls=calls), calls=calls) == name


class TestOrder:
    """Of two settings, neither need be as strong as the other."""

    def order(self, calls: int) -> set[tuple[str, str]]:
        resolved = {name: safety_from_preset(name, calls=calls) for name in PRESETS}
        return {
            (a, b)
            for a in PRESETS
            for b in PRESETS
            if a != b and is_as_strong(resolved[a], resolved[b], calls=calls)
        }

    @pytest.mark.parametrize("calls", [25, 50])
    def test_of_the_presets(self, calls: int) -> None:
        paper = ("off", "weak", "medium", "strong", "max")
        wanted = {(a, b) for k, a in enumerate(paper) for b in paper[:k]}
        wanted |= {("early", "off"), ("max", "early")}
        wanted |= {("guard", "off"), ("guard", "early"), ("guard-lite", "off")}
        wanted |= {("guard-max", name) for name in PRESETS if name != "guard-max"}
        assert self.order(calls) == wanted

    @pytest.mark.parametrize("calls", [2, 4, 7, 25])
    def test_is_an_order(self, calls: int) -> None:
        pairs = self.order(calls)
        assert {(a, c) for a, b in pairs for b2, c in pairs if b == b2 and a != c} <= pairs
        assert not any((b, a) in pairs for a, b in pairs)

    def test_of_other_numbers(self) -> None:
        floor = resolved_safety(replace(PRESETS["max"], stop_step=5), calls=25)
        for stop, strong in ((4, False), (5, True), (6, True), (None, True)):
            assert is_as_strong(replace(floor, stop_step=stop), floor, calls=25) == strong
        own = Safety(scale=6000, threshold=2, momentum_scale=0.6, momentum_beta=0.7, warmup_steps=0)
        assert is_as_strong(own, floor, calls=25)
        assert not is_as_strong(replace(own, scale=10), floor, calls=25)
