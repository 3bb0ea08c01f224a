"""Which UNet calls are made whole, and which take deep features over from an earlier call.

Feature caching (DeepCache, arXiv 2312.00858), off unless asked for: the deep layers run every n-th
call, the outermost ones at every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Call:
    """The work of one UNet call.

    Attributes:
        branches: UNet branches: 1, 2, or 2 and one for each concept.
        cached: whether the deep features are those of the last whole call.
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
        needed: branches of each call, never fewer than before.
        cache_interval: calls from one whole UNet to the next; 1 is every call.
    """
    calls: list[Call] = []
    whole, kept = -1, 0  # the last whole call, and the branches it had
    for index, branches in enumerate(needed):
        # A branch that the last whole call did not run has no features to reuse.
        cached = whole >= 0 and index - whole < cache_interval and branches <= kept
        if not cached:
            whole, kept = index, branches
        calls.append(Call(branches=branches, cached=cached))
    return tuple(calls)
