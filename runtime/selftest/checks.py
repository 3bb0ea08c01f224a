"""Checks and their outcomes: each has a name, and passes, fails, is skipped or does not apply."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from sld_edge.engines.errors import UserError, one_line

Say = Callable[[str], None]
Outcome = Literal["pass", "fail", "skipped", "not applicable"]
_WORDS: dict[Outcome, str] = {
    "pass": "pass",
    "fail": "FAIL",
    "skipped": "skipped",
    "not applicable": "none",
}


@dataclass(frozen=True, kw_only=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: of the check.
        outcome: "skipped" is a check that should have run, "not applicable" one that this provider
            or bundle does not have.
        text: the measured values and their bounds, or the reason.
        numbers: the measured values, for a report.
    """

    name: str
    outcome: Outcome
    text: str
    numbers: dict[str, Any] = field(default_factory=dict)


class Checks:
    """Collects the outcomes of checks and prints each as a line."""

    def __init__(self, say: Say, *, prefix: str = "") -> None:
        """`prefix` begins the name of every check."""
        self.say = say
        self.done: list[Check] = []
        self._prefix = prefix

    @property
    def failed(self) -> list[str]:
        """The names of the failed checks, in order."""
        return [check.name for check in self.done if check.outcome == "fail"]

    @property
    def skipped(self) -> list[str]:
        """The names of the skipped checks, in order."""
        return [check.name for check in self.done if check.outcome == "skipped"]

    def tell(self, name: str, text: str, outcome: Outcome | bool, **numbers: Any) -> None:
        """Record an outcome; True is "pass" and False is "fail"."""
        if isinstance(outcome, bool):
            outcome = "pass" if outcome else "fail"
        name = f"{self._prefix}{name}"
        self.done.append(Check(name=name, outcome=outcome, text=text, numbers=numbers))
        self.say(f"  {_WORDS[outcome]:4}  {name}: {text}")

    @contextmanager
    def watched(self, name: str) -> Iterator[None]:
        """Count an error as a failure of `name` and continue."""
        try:
            yield
        except UserError as error:
            self.tell(name, str(error), False)
        except Exception as error:  # of a library or of ours: the check names where it happened
            self.tell(name, f"{type(error).__name__}: {one_line(error)}", False)
