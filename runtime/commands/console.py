"""The parts that every command shares: one-line errors, exit codes, the format of help."""

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
    """A parser whose errors are one line, like all other errors of a user."""

    def __init__(self, *, prog: str, description: str, epilog: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raise an error, which `run_command` prints."""
        raise InputError(message, do=f"see {self.prog} --help")


def run_command(body: Callable[[], int | None]) -> int:
    """Run a command's body and return its exit code, or 0 for None.

    A user's mistake becomes a line on standard error and exit code 2.
    """
    try:
        code = body() or EXIT_OK
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted: no incomplete file is left", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of the output has closed it, like `| head`
        _drop_output()
        return EXIT_OK
    except OSError as error:  # for example a full disk behind standard output
        _drop_output()
        where = error.filename if error.filename is not None else "the output"
        print(f"error: {one_line(f'{where}: {error.strerror}')}", file=sys.stderr)
        return EXIT_USER_ERROR
    except MemoryError:
        print("error: out of memory | make smaller pictures, fewer at once", file=sys.stderr)
        return EXIT_USER_ERROR


def _drop_output() -> None:
    """Discard the rest of the output; else Python prints a second error when it exits."""
    with suppress(OSError):  # standard output may not be a file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def peak_memory() -> int | None:
    """Return this process's peak of memory in bytes; None if the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
