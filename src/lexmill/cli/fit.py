"""`lexmill fit` and `lexmill demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lexmill.cli import output


def fit(
    train: Annotated[Path | None, typer.Argument(help="Labelled rows: CSV, TSV, JSONL (.gz, .xz), Parquet.")] = None,
    out: Annotated[Path | None, typer.Option(help="The artefact to write; must not exist.")] = None,
    config: Annotated[Path | None, typer.Option(help="A recipe in TOML.")] = None,
    task: Annotated[str | None, typer.Option(help="classify, generate, …; docs/tasks.md has all.")] = None,
    model: Annotated[str | None, typer.Option(help="Hugging Face directory, artefact, minilm, lstm or gru.")] = None,
    test: Annotated[Path | None, typer.Option(help="Rows to evaluate on at the end.")] = None,
    validation: Annotated[Path | None, typer.Option(help="Rows to pick the best epoch by.")] = None,
    text: Annotated[str | None, typer.Option(help="The text column; guessed otherwise.")] = None,
    text_pair: Annotated[str | None, typer.Option(help="The second text's column, for pairs.")] = None,
    label: Annotated[str | None, typer.Option(help="The label column; guessed otherwise.")] = None,
    column: Annotated[
        list[str] | None, typer.Option(metavar="ROLE=COLUMN", help="Any other column; may be repeated.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per optimiser step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak of the schedule.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens a text is cut to.")] = None,
    seed: Annotated[int | None, typer.Option(help="Fixes new weights, data order and dropout.")] = None,
    encoding: Annotated[str | None, typer.Option(help="Of text files; utf-8 otherwise.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Pass over broken rows and count them.")] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other key; may be repeated.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Fine-tune a model on labelled text and write an artefact."""
    from lexmill import api
    from lexmill.errors import UserError

    if out is None:
        raise UserError("where should the artefact go?", where="command line", hint="give --out runs/NAME")
    result = api.fit(
        train, out=out, config=config, task=task, model=model, test=test, validation=validation, text=text,
        text_pair=text_pair, label=label, column=output.columns(column), epochs=epochs, batch_size=batch_size,
        learning_rate=learning_rate, max_length=max_length, seed=seed, encoding=encoding, skip_bad=skip_bad,
        set=set_ or [], resume=resume, watch=output.watch(quiet=quiet or json),
    )  # fmt: skip
    output.show(result.to_dict() if json else result.lines(), json=json)


def combine(
    base: Annotated[str, typer.Argument(help="What all were fitted from: a directory, an artefact, or minilm.")],
    adapters: Annotated[list[str], typer.Argument(metavar="NAME=ARTEFACT...", help="Artefacts fitted by LoRA.")],
    out: Annotated[Path | None, typer.Option(help="The artefact to write; must not exist.")] = None,
) -> None:
    """Put several adapters over one trunk, in one artefact. Each answers as the artefact that it came from."""
    from lexmill import api
    from lexmill.errors import UserError

    named = {name: path for name, _, path in (pair.partition("=") for pair in adapters)}
    if out is None:
        raise UserError("where should the artefact go?", where="command line", hint="give --out runs/NAME")
    if len(named) < len(adapters) or not all(named.values()):
        raise UserError("each adapter needs a name of its own", where="command line", hint="give NAME=ARTEFACT")
    made = api.combine(base, named, out=out)
    output.show([f"wrote {made.path} with the adapters {', '.join(named)}"], json=False)


def demo(
    out: Annotated[Path, typer.Option(help="Where the artefact goes.")] = Path("runs/demo"),
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 3,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Do the whole job on bundled data. Fine-tunes, evaluates, verifies, serves, asks three questions and reports."""
    from lexmill.cli.demo import demo

    demo(out, epochs=epochs, watch=output.watch(quiet=quiet))
