"""`lexmill import`: models that other programs wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lexmill.cli import output
from lexmill.errors import UserError

_SHOWN = 20


def import_(
    source: Annotated[
        Path, typer.Argument(help="A Hugging Face directory, one of peft with an adapter, or a GGUF file.")
    ],
    out: Annotated[
        Path, typer.Option(help="The artefact to write (of GGUF: a Hugging Face directory); must not exist.")
    ],
    base: Annotated[str | None, typer.Option(help="What the adapter was trained on; default: where it says.")] = None,
    labels: Annotated[
        Path | None, typer.Option(help="Names of the classes, one a line; default: those of config.json.")
    ] = None,
    pairs: Annotated[bool, typer.Option("--pairs", help="The classes are those of two texts together.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Take over a model that another program trained. A directory becomes an artefact that answers as it did, without
    training; an adapter is merged into its model. A GGUF file becomes a directory that fit takes as its model."""
    from lexmill import api
    from lexmill.artifact.card import labels as labels_in

    if source.is_file():
        for flag, value in (("--base", base), ("--labels", labels), ("--pairs", pairs)):
            if value:
                raise UserError("a GGUF file has neither adapter nor classes", where=flag, hint="leave it out")
        with output.counter("importing", quiet=quiet or json, of="tensors") as progress:
            found = api.import_gguf(source, out=out, progress=progress)
        output.show(found.to_dict() if json else found.lines(), json=json)
        return
    artifact = api.import_pretrained(source, out=out, base=base, labels=_names(labels), pairs=pairs)
    task, effect = artifact.manifest.task.name, artifact.manifest.history[-1].effect
    names = [name for _, named in labels_in(artifact.manifest) for name in named]
    lines = [f"task: {task}"]
    if names:
        lines.append(f"{len(names)} labels: {', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''}")
    if names and all(name.startswith("LABEL_") for name in names):
        lines.append("the files do not say what the classes are called: --labels FILE names them")
    if effect["merged_matrices"]:
        lines.append(f"{effect['merged_matrices']:.0f} low-rank matrices merged, and kept in adapters/default")
    told: dict[str, Any] = {"artifact": str(artifact.path), "task": task, "labels": names, **effect}
    output.show(told if json else [*lines, f"wrote {artifact.path}"], json=json)


def _names(file: Path | None) -> list[str]:
    """The lines of a file. A `UserError` where there are none, or one is empty."""
    if file is None:
        return []
    try:
        names = [line.strip() for line in file.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", where=str(file), hint="one label a line, in UTF-8") from error
    if not names or not all(names):
        where = f"{file}:{names.index('') + 1}" if names else str(file)
        raise UserError("there is no label", where=where, hint="one label a line, in the order of the outputs")
    return names
