"""The command line: verbs only. A verb's module is imported when the verb is asked for, and a verb imports its room in
its own body, so that `lexmill --help` stays instant."""

from __future__ import annotations

import errno
import keyword
import os
import sys
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from lexmill.errors import Spoken, UserError

INTERRUPTED = 130
"""With what typer ends on SIGINT, without a word."""

VERBS = {
    "fit": ("fit", "Fine-tune a model on labelled text and write an artefact."),
    "combine": ("fit", "Put several adapters over one trunk, in one artefact."),
    "compress": ("compress", "Make a model smaller or faster."),
    "export": ("export", "Write a model for other programs, checked against its source."),
    "demo": ("fit", "Do the whole job on bundled data."),
    "search": ("learn", "Find good settings by training with many."),
    "tokenizer": ("tokenizer", "Train a tokenizer on text."),
    "check": ("data", "Look at data before training on it."),
    "augment": ("data", "Make more rows of those there are."),
    "label": ("learn", "Label rows with a model, where it is sure."),
    "mine": ("learn", "Find hard negatives for pairs of texts."),
    "evaluate": ("run", "Score a model on labelled data, with confidence intervals."),
    "compare": ("run", "Compare two models on the same labelled rows."),
    "predict": ("run", "Answer rows as a stream, one JSON object a line."),
    "serve": ("run", "Serve artefacts over HTTP."),
    "show": ("inspect", "Print what an artefact is, was made from and can do."),
    "verify": ("inspect", "Check that what was trained is what is served."),
    "import": ("imports", "Take over a model that another program trained."),
}
"""Every verb: the module it stands in, and its line in `lexmill --help`, which begins its docstring."""


def function_of(verb: str) -> Any:
    """The function that does a verb; its name ends in `_` where Python keeps the verb's for itself."""
    return getattr(import_module(f"lexmill.cli.{VERBS[verb][0]}"), verb + "_" * keyword.iskeyword(verb))


_STYLE: dict[str, Any] = {
    "add_completion": False,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "context_settings": {"help_option_names": ["-h", "--help"]},
}


class Verbs(TyperGroup):
    """Knows the verbs by name, and builds the one that is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        verb = typer.Typer(**_STYLE)
        verb.command(cmd_name)(function_of(cmd_name))
        return typer.main.get_command(verb)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in VERBS.items()])


app = typer.Typer(name="lexmill", cls=Verbs, no_args_is_help=True, **_STYLE)


@app.callback()
def lexmill() -> None:
    """From text to a small, fast, monitored language service on the hardware people own."""


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
