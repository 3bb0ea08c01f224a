"""Which calls are whole, and which take features from an earlier one."""

from __future__ import annotations

import pytest

from sld_edge.runtime.denoise.schedule import Call, schedule


def told(needed: list[int], *, cache_interval: int = 1) -> str:
    """A word a call: branches, "c" where features are cached."""
    calls = schedule(needed, cache_interval=cache_interval)
    return " ".join(f"{c.branches}{'c' * c.cached}" for c in calls)


def test_off_is_every_branch_of_every_call() -> None:
    needed = [1, 1, 2, 3, 5]
    calls = schedule(needed, cache_interval=1)
    assert calls == tuple(Call(branches=k, cached=False) for k in needed)


@pytest.mark.parametrize(
    ("interval", "wanted"),
    [(2, "3 3c 3 3c 3 3c 3"), (3, "3 3c 3c 3 3c 3c 3"), (7, "3" + " 3c" * 6)],
)
def test_features_are_cached_between_whole_calls(interval: int, wanted: str) -> None:
    assert told([3] * 7, cache_interval=interval) == wanted


def test_a_new_branch_makes_a_call_whole() -> None:
    assert told([2, 2, 3, 3, 3], cache_interval=5) == "2 2c 3 3c 3c"
    assert told([1, 1, 3, 3], cache_interval=5) == "1 1c 3 3c"
    assert told([1, 1, 2, 2], cache_interval=5) == "1 1c 2 2c"
    assert told([2, 2, 2, 5, 5], cache_interval=2) == "2 2c 2 5 5c"
