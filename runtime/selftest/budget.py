"""The time that a certificate may take."""

from __future__ import annotations

import time
from collections.abc import Callable


class Budget:
    """Counts the seconds from its making; `clock` is for tests."""

    def __init__(self, seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._clock = clock
        self._begin = clock()

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._begin

    def covers(self, seconds: float = 0, *, share: float = 1) -> bool:
        """Whether so many seconds more end within a share of the budget."""
        return self.spent + seconds < self.seconds * share
