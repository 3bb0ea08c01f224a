"""One error for whatever a file of a checkpoint makes Python or a library raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sld_edge.engines.errors import CheckpointError, UserError, one_line

NOT_BUILT = "config.json does not describe a model that can be built"
# What code raises that meets a value of another kind or size than it was written for.
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
        what: begins the message.
        kinds: which exceptions; of UserErrors, only the very classes named here.
        panics: also those of Rust code, which are no `Exception`.
        do: advice that the error ends with.

    Raises:
        CheckpointError: one of them was raised.
    """
    try:
        yield
    except UserError as error:
        if type(error) not in kinds:
            raise
        raise CheckpointError(what, got=error, do=do) from error
    except BaseException as error:
        if not isinstance(error, kinds) and not (panics and _is_panic(error)):
            raise
        complaint = f"{type(error).__name__}: {one_line(error)}"
        raise CheckpointError(what, got=complaint, do=do) from error


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"
