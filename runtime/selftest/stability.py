"""Checks of a bundle against itself: every bit of a picture stays, whatever happened before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from sld_edge.engines.errors import EngineError
from sld_edge.engines.tensorrt.engine import TrtEngine
from sld_edge.runtime.result import Result
from sld_edge.runtime.selftest.budget import Budget
from sld_edge.runtime.selftest.checks import Checks
from sld_edge.runtime.selftest.comparison import pixels, same_bits
from sld_edge.runtime.selftest.subject import Load, Subject

# Takes a subject and changes of the request; makes a picture, always the same without changes.
Ask = Callable[..., Result]
SAME_SEED = "the same seed again"
GRAPHS = "with and without CUDA graphs"
BATCHES = "batches of 1, 2 and 4"
MEMORY = "out of memory, and recovery"
RESTART = "after a restart"
KERNELS = "compiled kernels are kept"
_SIZES = (1, 2, 4)
_MOST_ALLOCATIONS = 40
_TIMES = 4  # a device queues the first run of a call, captures the second, replays the third


class Stability:
    """Makes one picture again and again; `check_loaded` comes first, `check_reloaded` last."""

    def __init__(
        self,
        ask: Ask,
        checks: Checks,
        *,
        steps: int,
        levels: float,
        budget: Budget | None = None,
    ) -> None:
        """Check the pictures of `ask`.

        Args:
            ask: makes the picture.
            checks: takes the outcomes.
            steps: of the picture.
            levels: the largest mean difference of a picture made in a batch, in levels of 255.
            budget: the time; a check that would begin after it is skipped.
        """
        self._ask, self._checks = ask, checks
        self._steps, self._levels, self._budget = steps, levels, budget
        self._first: Result | None = None
        self._kernels: dict[str, Path] = {}

    def check_loaded(self, subject: Subject) -> None:
        """Check the same seed and batches in one loaded pipeline."""
        for name, check in (
            (SAME_SEED, self._same_seed),
            (BATCHES, self._batches),
        ):
            with self._checks.watched(name):
                if self._in_time(name):
                    check(name, subject)
        with self._checks.watched(KERNELS):
            engines = {name: subject.pipeline.engine(name) for name in subject.loader.plans}
            self._kernels = {
                name: engine.kernel_file
                for name, engine in engines.items()
                if isinstance(engine, TrtEngine) and engine.kernel_file is not None
            }

    def check_reloaded(self, load: Load, *, has_graphs: bool, compiles: bool) -> None:
        """Check the picture of new pipelines, without CUDA graphs and with, and a full memory.

        Args:
            load: loads the bundle again; nothing else may be loaded.
            has_graphs: whether CUDA graphs are used at all.
            compiles: whether the engine compiles kernels when it runs and keeps them.
        """
        if has_graphs:
            if self._in_time(GRAPHS):
                with self._checks.watched(GRAPHS), load(False) as subject:
                    self._tell_same(GRAPHS, self._ask(subject))
        else:
            self._checks.tell(GRAPHS, "this provider has none", "not applicable")
        if self._in_time(RESTART):
            with self._checks.watched(RESTART), load(True) as subject:
                self._tell_same(RESTART, self._ask(subject))
                # Here, where the device's memory has grown least.
                with self._checks.watched(MEMORY):
                    if self._in_time(MEMORY):
                        self._memory(MEMORY, subject)
        if not compiles:
            self._checks.tell(KERNELS, "this provider compiles none", "not applicable")
            return
        if not self._kernels:
            text = "the cache is switched off or not usable"
            self._checks.tell(KERNELS, text, "not applicable")
            return
        sizes = {
            name: path.stat().st_size if path.exists() else 0
            for name, path in self._kernels.items()
        }
        text = ", ".join(f"{name} {size} bytes" for name, size in sizes.items())
        self._checks.tell(KERNELS, text, all(sizes.values()))

    def _in_time(self, name: str) -> bool:
        if self._budget is None or self._budget.covers():
            return True
        self._checks.tell(name, "the time was over", "skipped")
        return False

    def _same_seed(self, name: str, subject: Subject) -> None:
        self._first = self._ask(subject)
        for number in range(2, _TIMES + 1):
            why = same_bits(self._ask(subject), self._first)
            if why is not None:
                self._checks.tell(name, f"picture {number}: {why}", False)
                return
        self._checks.tell(name, f"{_TIMES} pictures, equal to the last bit", True)

    def _batches(self, name: str, subject: Subject) -> None:
        sizes = _sizes(subject)
        if len(sizes) < 2:
            self._checks.tell(name, "the plans take one image at a time", "not applicable")
            return
        count = sizes[-1]
        alone = self._ask(subject, count=count, batch_size=1)
        worst: dict[int, float] = {}
        for size in sizes[1:]:
            together = self._ask(subject, count=count, batch_size=size)
            apart = np.abs(pixels(together) - pixels(alone)).mean(axis=(1, 2, 3))
            worst[size] = float(apart.max())
        text = ", ".join(f"batch {size}: mean {mean:.3f} levels" for size, mean in worst.items())
        text = f"{text} from alone (to {self._levels:g})"
        why = same_bits(self._ask(subject, count=count, batch_size=1), alone)
        if why is not None:
            text = f"{text}; one by one again: {why}"
        passed = why is None and all(mean <= self._levels for mean in worst.values())
        self._checks.tell(name, text, passed, mean_levels=_by_text(worst))

    def _memory(self, name: str, subject: Subject) -> None:
        device = subject.device
        if device is None:
            self._checks.tell(name, "the CPU's memory is the system's", "not applicable")
            return
        before = self._ask(subject)
        # More steps need more memory for the numbers of the calls; a batch, for everything.
        most = _sizes(subject)[-1]
        larger = {"steps": self._steps + 1, "count": most, "batch_size": most}
        for refused in range(_MOST_ALLOCATIONS):  # the first allocation, then the second, ...
            try:
                with device.full_after(refused):
                    self._ask(subject, **larger)
                break
            except EngineError as error:
                if "out of" not in str(error):
                    raise
            why = same_bits(self._ask(subject), before)
            if why is not None:
                text = f"allocation {refused + 1} was refused, and the next picture is wrong: {why}"
                self._checks.tell(name, text, False)
                return
        else:
            self._checks.tell(name, f"still refused after {_MOST_ALLOCATIONS} allocations", False)
            return
        text = f"each of {refused} allocations was refused once; the pictures after it are equal"
        self._checks.tell(name, text, refused > 0, refused=refused)

    def _tell_same(self, name: str, got: Result) -> None:
        if self._first is None:
            self._checks.tell(name, "there is no first picture to compare with", False)
            return
        why = same_bits(got, self._first)
        self._checks.tell(name, "equal to the last bit" if why is None else why, why is None)


def _sizes(subject: Subject) -> list[int]:
    """Return the batches that the plans take."""
    most = subject.largest_batch
    return [size for size in _SIZES if most is None or size <= most]


def _by_text(numbers: Mapping[int, float]) -> dict[str, float]:
    return {str(key): value for key, value in numbers.items()}
