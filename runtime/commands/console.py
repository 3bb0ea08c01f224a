"""What every command shares: one-line errors, exit codes, help that is pleasant to read."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from rich_argparse import RawDescriptionRichHelpFormatter

from sld_edge.engines.errors import InputError, UserError, one_line

EXIT_OK, EXIT_FAILED, EXIT_USER_ERROR, EXIT_FLAGGED, EXIT_INTERRUPTED = 0, 1, 2, 3, 130


class HelpFormatter(RawDescriptionRichHelpFormatter):
    """Help in colour on a terminal, plain in a pipe; examples keep their lines."""

    group_name_formatter = str.capitalize


class Parser(argparse.ArgumentParser):
    """A parser whose complaint is one line, as every other mistake's."""

    def __init__(self, *, prog: str, description: str, epilog: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise what `run_command` prints."""
        raise InputError(message, do=f"see {self.prog} --help")


def run_command(body: Callable[[], int | None]) -> int:
    """Run a command's body and return its exit code, 0 if it gives none.

    A user's mistake becomes one line on stderr and exit code 2.
    """
    try:
        code = body() or EXIT_OK
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted: nothing half-written was left behind", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        _drop_output()
        return EXIT_OK
    except OSError as error:  # a full disk behind standard output, for one
        _drop_output()
        where = error.filename if error.filename is not None else "the output"
        print(f"error: {one_line(f'{where}: {error.strerror}')}", file=sys.stderr)
        return EXIT_USER_ERROR
    except MemoryError:
        print("error: out of memory | make smaller pictures, fewer at once", file=sys.stderr)
        return EXIT_USER_ERROR


def _drop_output() -> None:
    """Let what is still to be flushed go nowhere, or Python complains once more at its end."""
    with suppress(OSError):  # standard output may be no file at all
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def peak_memory() -> int | None:
    """Return the most memory this process held, in bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
