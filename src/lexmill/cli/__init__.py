"""The command line: verbs only. A verb imports its room in its own body, so that `lexmill --help` stays instant."""

from __future__ import annotations

import sys

import typer

from lexmill.cli import data, fit, inspect, run
from lexmill.errors import Spoken, UserError

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
    except Spoken as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
