"""The command line: verbs only. A verb imports its room in its own body, so that `lexmill --help` stays instant."""

from __future__ import annotations

import errno
import os
import sys

import typer

from lexmill.cli import data, fit, inspect, run
from lexmill.errors import Spoken, UserError

INTERRUPTED = 130
"""With what typer ends on SIGINT, without a word."""

app = typer.Typer(
    name="lexmill",
    help="From text to a small, fast, monitored language service on the hardware people own.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (fit, data, run, inspect):
    module.add_to(app)


def main() -> None:
    """Entry point: 0 done, 1 a failure, 2 a user's mistake, 130 interrupted."""
    try:
        app()
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            print("interrupted", file=sys.stderr)
        raise
    except Spoken as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: {error.filename or 'output'}: disk full\n  free some space", file=sys.stderr)
        # What could not be written is dropped here; at exit Python would try once more, and fail with words of its own.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
