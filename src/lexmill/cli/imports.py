"""`lexmill import`: models in other formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lexmill.cli import output


def import_(
    file: Annotated[Path, typer.Argument(help="A GGUF file: LLaMA, Mistral, Qwen2, Qwen3, SmolLM …")],
    out: Annotated[Path, typer.Option(help="The Hugging Face directory to write; must not exist.")],
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Make a Hugging Face directory of a GGUF file, which fit then takes as its model."""
    from lexmill import api

    with output.counter("importing", quiet=quiet or json, of="tensors") as progress:
        found = api.import_gguf(file, out=out, progress=progress)
    output.show(found.to_dict() if json else found.lines(), json=json)
