"""One error for all exceptions of Python or a library about a checkpoint's file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sld_edge.engines.errors import CheckpointError, UserError, one_line

NOT_BUILT = "config.json does not describe a model that can be built"
# The exceptions of code that reads a value of the wrong kind or size.
ODD_VALUES = (
    KeyError,
    IndexError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)


@contextmanager
def refusing(
    what: str, *kinds: type[Exception], panics: bool = False, do: str | None = None
) -> Iterator[None]:
    """Turn exceptions inside the `with` block into a CheckpointError.

    Args:
        what: the beginning of the message.
        kinds: the exceptions; a UserError only where its own class, not a base class, is listed.
        panics: also panics of Rust code, which are not an `Exception`.
        do: advice that the error ends with.

    Raises:
        CheckpointError: one of these exceptions was raised.
    """
    try:
        yield
    except UserError as error:
        if type(error) not in kinds:
            raise
        raise CheckpointError(what, got=error, do=do) from error
    except BaseException as error:
        panic = panics and type(error).__name__ == "PanicException"
        if not isinstance(error, kinds) and not panic:
            raise
        complaint = f"{type(error).__name__}: {one_line(error)}"
        raise CheckpointError(what, got=complaint, do=do) from error
