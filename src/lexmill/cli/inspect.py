"""`lexmill show` and `verify`: looking at an artefact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lexmill.cli import output
from lexmill.cli.run import Engine


def show(
    artifact: Annotated[Path, typer.Argument(help="An artefact.")],
    json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Print what an artefact is, was made from and can do."""
    from lexmill.artifact import Artifact, describe, summary

    opened = Artifact.open(artifact)
    output.show(summary(opened) if json else describe(opened), json=json)


def verify(
    artifact: Annotated[Path, typer.Argument(help="An artefact.")],
    engine: Engine = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Check that what was trained is what is served. Compares trained, stored, reloaded, served number by number."""
    from lexmill.verify import verify

    found = verify(artifact, runtime=engine)
    output.show(found.to_dict() if json else found.lines(), json=json)
    if not found.ok:
        raise typer.Exit(1)
