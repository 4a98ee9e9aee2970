"""`lexmill fit` and `lexmill demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lexmill.cli import output


def add_to(app: typer.Typer) -> None:
    app.command()(fit)
    app.command()(demo)


def fit(
    train: Annotated[Path | None, typer.Argument(help="Labelled rows: CSV, TSV, JSONL (.gz, .xz), Parquet.")] = None,
    out: Annotated[Path | None, typer.Option(help="The artefact to write; must not exist.")] = None,
    config: Annotated[Path | None, typer.Option(help="A recipe in TOML.")] = None,
    task: Annotated[str | None, typer.Option(help="classify or generate.")] = None,
    model: Annotated[str | None, typer.Option(help="Hugging Face directory, artefact, or minilm.")] = None,
    test: Annotated[Path | None, typer.Option(help="Rows to evaluate on at the end.")] = None,
    validation: Annotated[Path | None, typer.Option(help="Rows to pick the best epoch by.")] = None,
    text: Annotated[str | None, typer.Option(help="The text column; guessed otherwise.")] = None,
    text_pair: Annotated[str | None, typer.Option(help="The second text's column, for pairs.")] = None,
    label: Annotated[str | None, typer.Option(help="The label column; guessed otherwise.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples per optimiser step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak of the schedule.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens a text is cut to.")] = None,
    seed: Annotated[int | None, typer.Option(help="Fixes weights, order, dropout.")] = None,
    encoding: Annotated[str | None, typer.Option(help="Of text files; utf-8 otherwise.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Pass over broken rows and count them.")] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other key.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Fine-tune a model on labelled text and write an artefact."""
    from lexmill.config import load
    from lexmill.errors import UserError
    from lexmill.fit import FitConfig, fit

    if out is None:
        raise UserError("where should the artefact go?", where="command line", hint="give --out runs/NAME")
    flags: dict[str, Any] = {
        "data.train": train, "data.test": test, "data.validation": validation, "data.text": text,
        "data.text_pair": text_pair, "data.label": label, "data.encoding": encoding,
        "data.skip_bad": True if skip_bad else None, "task": task, "model": model, "train.epochs": epochs,
        "train.batch_size": batch_size, "train.learning_rate": learning_rate, "train.seed": seed,
        "options.max_length": max_length,
    }  # fmt: skip
    loaded = load(FitConfig, file=config, sets=set_ or [], flags=flags)
    result = fit(loaded.value, out, resume=resume, watch=output.watch(quiet=quiet or json), origins=loaded.origins)
    output.show(result.to_dict() if json else result.lines(), json=json)


def demo(
    out: Annotated[Path, typer.Option(help="Where the artefact goes.")] = Path("runs/demo"),
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 4,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """The main job on bundled data: fine-tune, evaluate, verify, serve, ask, report."""
    from lexmill.cli.demo import demo

    demo(out, epochs=epochs, watch=output.watch(quiet=quiet))
