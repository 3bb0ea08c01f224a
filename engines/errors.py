"""The errors a user can cause or meet, each one line and exit code 2.

The message says what is wrong, what was got, what was expected, and what to do about it.
"""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right; printed as one line, exit code 2."""

    def __init__(
        self,
        what: str,
        *,
        got: object = None,
        expected: object = None,
        do: str | None = None,
    ) -> None:
        """`what` names the thing; `got`, `expected` and `do` are added where they help."""
        parts = [what]
        if got is not None:
            parts.append(f"got {got}")
        if expected is not None:
            parts.append(f"expected {expected}")
        if do is not None:
            parts.append(do)
        super().__init__(" | ".join(parts).replace("\n", " "))


class InputError(UserError):
    """An argument, option or prompt that cannot be honoured."""


class BundleError(UserError):
    """A bundle that is missing, cut short, altered, from the future, or not what it says."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read or that the graph builder does not know."""


class MissingPackageError(UserError):
    """An optional package that is not installed."""

    def __init__(self, package: str, *, extra: str, why: str) -> None:
        """Name the package, what it is for, and the pip command that brings it."""
        super().__init__(
            f"{why} needs the package {package}", do=f'pip install "sld-edge[{extra}]"'
        )


class EngineError(UserError):
    """A graph that an engine cannot load or run here."""


class NumericsError(UserError):
    """NaN or infinity in what a component gave."""


class OutputError(UserError):
    """A file that cannot be written."""


def one_line(complaint: object) -> str:
    """Return what another library complains of as one short line."""
    text = " ".join(str(complaint).split())
    return (text if text else type(complaint).__name__)[:300]
