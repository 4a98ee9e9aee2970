"""`lexmill compress`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lexmill.cli import output


def compress(
    artifact: Annotated[Path, typer.Argument(help="An artefact.")],
    out: Annotated[Path | None, typer.Option(help="The artefact to write; must not exist.")] = None,
    step: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD[,KEY=VALUE…]", help="One step, e.g. distil,layers=3; may be repeated."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="The chain and all else in TOML.")] = None,
    max_drop: Annotated[float | None, typer.Option(help="Largest loss of the mean score a row, e.g. 0.01.")] = None,
    data: Annotated[Path | None, typer.Option(help="Training rows; those of fit otherwise.")] = None,
    validation: Annotated[Path | None, typer.Option(help="Rows to choose on; those of fit otherwise.")] = None,
    test: Annotated[Path | None, typer.Option(help="Rows for the proof; those of fit otherwise.")] = None,
    unlabelled: Annotated[Path | None, typer.Option(help="Rows without labels to learn from.")] = None,
    seed: Annotated[int | None, typer.Option(help="Fixes which rows are held out, and all that is drawn.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Make a model smaller or faster. Measures both, and proves on rows that nothing was chosen on what it costs."""
    from lexmill import api
    from lexmill.errors import UserError

    if out is None:
        raise UserError("where should the artefact go?", where="command line", hint="give --out runs/NAME")
    result = api.compress(
        artifact, out=out, steps=step or (), config=config, max_drop=max_drop, data=data, validation=validation,
        test=test, unlabelled=unlabelled, seed=seed, watch=output.watch(quiet=quiet or json),
    )  # fmt: skip
    output.show(result.to_dict() if json else result.lines(), json=json)
