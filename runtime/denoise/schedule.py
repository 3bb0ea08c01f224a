"""Which UNet calls are made whole, and which take something over from an earlier call.

Two savings, both off unless asked for. Feature caching (DeepCache, arXiv 2312.00858): the deep
layers run every n-th call, the outermost ones at every call. Safety cadence: the safety branches
run every n-th call, and between them their distance from the unconditional branch is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Call:
    """What one UNet call computes.

    Attributes:
        branches: that the UNet runs: 1, 2, or 2 and one for each concept.
        safe: whether guidance takes safety predictions, this call's or kept ones.
        cached: whether the deep features are those of the last call that was whole.
    """

    branches: int
    safe: bool
    cached: bool

    @property
    def keeps(self) -> bool:
        """Whether the safety predictions are kept ones."""
        return self.safe and self.branches <= 2


def schedule(
    needed: Sequence[int], *, cache_interval: int, safety_interval: int
) -> tuple[Call, ...]:
    """Return what each call of a run computes.

    Args:
        needed: branches that count in each call, never fewer than before.
        cache_interval: calls from one whole UNet to the next; 1 is every call.
        safety_interval: calls from one run of the safety branches to the next; 1 is every call.
    """
    calls: list[Call] = []
    whole = ran_safety = -1  # the last call that did
    kept = 0  # branches whose deep features that call left
    for index, wanted in enumerate(needed):
        safe, branches = wanted > 2, wanted
        if safe and (ran_safety < 0 or index - ran_safety >= safety_interval):
            ran_safety = index
        elif safe:
            branches = 2
        # A branch that was not there then has no features; the first ones stay the same.
        cached = whole >= 0 and index - whole < cache_interval and branches <= kept
        if not cached:
            whole, kept = index, branches
        calls.append(Call(branches=branches, safe=safe, cached=cached))
    return tuple(calls)
