"""What verbs print: results on standard output, progress on standard error."""

from __future__ import annotations

import json as codec
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lexmill.fit import Watch


def show(content: Mapping[str, Any] | Sequence[str], *, json: bool) -> None:
    """Print a result: an object as JSON, or lines for people."""
    if json:
        print(codec.dumps(content, ensure_ascii=False, indent=2))
    else:
        print("\n".join(content))


def watch(*, quiet: bool) -> Watch:
    """How a person follows a run: notes and a progress bar on standard error, or nothing."""
    from lexmill.fit import Watch
    from lexmill.monitor import ProgressSink

    if quiet:
        return Watch()
    return Watch(note=lambda line: print(line, file=sys.stderr, flush=True), sinks=[ProgressSink()])


@contextmanager
def counter(what: str, *, quiet: bool, of: str = "rows") -> Generator[Callable[[int], None] | None]:
    """A count of what is done, on standard error, where that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    with Console(stderr=True).status(what) as status:
        yield lambda done: status.update(f"{what}: {done:,} {of}")


def columns(given: Sequence[str] | None) -> dict[str, str]:
    """`ROLE=COLUMN` as the flag `--column` takes it, by role."""
    from lexmill.errors import UserError

    found: dict[str, str] = {}
    for one in given or ():
        role, sign, column = one.partition("=")
        if not (role and sign and column):
            raise UserError(f"'{one}' is not ROLE=COLUMN", where="--column", hint="for example --column question=ask")
        found[role] = column
    return found
