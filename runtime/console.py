"""What every command shares: one-line errors, exit codes, help that is pleasant to read."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from rich_argparse import RawDescriptionRichHelpFormatter

from sld_edge.engines.errors import InputError, UserError

EXIT_OK, EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130


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
        return body() or EXIT_OK
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted: nothing half-written was left behind", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK


def peak_memory() -> int | None:
    """Return the most memory this process held, in bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
