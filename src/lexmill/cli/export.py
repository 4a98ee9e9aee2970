"""`lexmill export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lexmill.cli import output


def export(
    artifact: Annotated[Path, typer.Argument(help="An artefact, or a plain Hugging Face directory.")],
    out: Annotated[Path | None, typer.Option(help="The artefact to write; must not exist.")] = None,
    format: Annotated[str, typer.Option(help="One of those that docs/exporting.md lists.")] = "onnx",
    set: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option of the format.")
    ] = None,
    runtime: Annotated[str | None, typer.Option(help="What answers where no --engine is given, e.g. openvino.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Write a model for other programs, checked against its source. Each file must answer the stored probes alike."""
    from lexmill import api
    from lexmill.errors import UserError

    if out is None:
        raise UserError("where should the artefact go?", where="command line", hint="give --out runs/NAME")
    watch = output.watch(quiet=quiet or json)
    result = api.export(artifact, out=out, format=format, set=set or (), runtime=runtime, note=watch.note)
    output.show(result.to_dict() if json else result.lines(), json=json)
