"""Feature caching (DeepCache, arXiv 2312.00858): which calls run the whole UNet.

The deep layers run in every N-th call; the outermost layers run in every call. The default is off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Call:
    """The work of one UNet call.

    Attributes:
        branches: the number of UNet branches: 1, 2, or 2 and a branch for each concept.
        cached: whether the call uses the deep features of the last whole call.
    """

    branches: int
    cached: bool

    @property
    def safe(self) -> bool:
        """Whether the call has safety branches."""
        return self.branches > 2


def schedule(needed: Sequence[int], *, cache_interval: int) -> tuple[Call, ...]:
    """Return the calls of a run.

    Args:
        needed: the number of branches of each call.
        cache_interval: every N-th call runs the whole UNet; with 1, every call.
    """
    calls: list[Call] = []
    whole, kept = -1, 0  # the last whole call, and its number of branches
    for index, branches in enumerate(needed):
        # A branch that the last whole call did not run has no features to reuse.
        cached = whole >= 0 and index - whole < cache_interval and branches <= kept
        if not cached:
            whole, kept = index, branches
        calls.append(Call(branches=branches, cached=cached))
    return tuple(calls)
