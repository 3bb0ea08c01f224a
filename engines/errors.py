"""The errors that a user can cause or meet; each is one line, with exit code 2.

The message says what is wrong, what sld-edge got, what it expected, and what to do about it.
"""

from __future__ import annotations

LINE = 300  # characters of an error's line
_LEAST = 80  # characters that a shortened part keeps
_PART = " | "


class UserError(Exception):
    """An error that the user can put right; printed as one line, exit code 2."""

    def __init__(
        self,
        what: str,
        *,
        got: object = None,
        expected: object = None,
        do: str | None = None,
    ) -> None:
        """`what` names the thing; `got`, `expected` and `do` are added where they help.

        Only `what` and `got` hold text from outside. Both are shortened so that the line fits in
        `LINE` characters: first `got`, down to `_LEAST`, then `what`.
        """
        tail = [] if expected is None else [f"expected {expected}"]
        tail += [] if do is None else [do]
        rest = sum(len(part) + len(_PART) for part in tail)
        given = None if got is None else printable(str(got))
        if given is not None:
            rest += len(_PART) + len("got ")
        kept = 0 if given is None else min(len(given), _LEAST)
        parts = [shortened(printable(what), max(LINE - rest - kept, _LEAST))]
        if given is not None:
            parts.append(f"got {shortened(given, max(LINE - rest - len(parts[0]), _LEAST))}")
        super().__init__(_PART.join([*parts, *map(printable, tail)]))


class InputError(UserError):
    """An argument, option or prompt that cannot be honoured."""


class PolicyError(UserError):
    """A request that this device's policy does not allow, or a policy that cannot be used."""


class BundleError(UserError):
    """A bundle that is missing, cut short, altered, too new, or not as its manifest says."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read or that the graph builder does not know."""


class MissingPackageError(UserError):
    """An optional package that is not installed."""

    def __init__(self, package: str, *, extra: str, why: str) -> None:
        """Name the package, its use (`why`), and the pip command that installs it."""
        super().__init__(
            f"{why} needs the package {package}", do=f'pip install "sld-edge[{extra}]"'
        )


class EngineError(UserError):
    """A graph that an engine cannot load or run here."""


class NumericsError(UserError):
    """NaN or infinity in a component's output."""


class OutputError(UserError):
    """A file that cannot be written."""


def one_line(complaint: object) -> str:
    """Return another library's error message as one short line."""
    text = " ".join(str(complaint).split())
    return shortened(text if text else type(complaint).__name__, LINE)


def shortened(text: object, most: int) -> str:
    """Return a text of at most `most` characters; the middle of a longer text is left out."""
    whole = str(text)
    if len(whole) <= most:
        return whole
    head = (most - 1) * 2 // 3
    return f"{whole[:head]}…{whole[len(whole) - (most - 1 - head) :]}"


def printable(text: str) -> str:
    """Return a text as one line that any terminal can print: no control codes, no surrogates."""
    plain = " ".join(text.split("\n"))
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in plain)
