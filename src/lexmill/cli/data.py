"""`lexmill check`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lexmill.cli import output


def add_to(app: typer.Typer) -> None:
    app.command()(check)


def check(
    data: Annotated[Path, typer.Argument(help="Labelled rows: CSV, TSV, JSONL (.gz, .xz), Parquet.")],
    test: Annotated[Path | None, typer.Option(help="Test rows, to look for overlap and unknown labels.")] = None,
    model: Annotated[str | None, typer.Option(help="Whose tokenizer counts tokens.")] = None,
    text: Annotated[str | None, typer.Option(help="The text column; guessed otherwise.")] = None,
    text_pair: Annotated[str | None, typer.Option(help="The second text's column, for pairs.")] = None,
    label: Annotated[str | None, typer.Option(help="The label column; guessed otherwise.")] = None,
    max_length: Annotated[int, typer.Option(help="With --model: longer texts are reported.")] = 128,
    encoding: Annotated[str, typer.Option(help="Of text files.")] = "utf-8",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Pass over broken rows and count them.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Look at data before training on it: rows, labels, duplicates, conflicts, overlap."""
    from lexmill.data import guess, open_source
    from lexmill.data.check import check

    source = open_source(data, encoding=encoding, skip_bad=skip_bad)
    other = open_source(test, encoding=encoding, skip_bad=skip_bad) if test else None
    given = {"text": text, "text_pair": text_pair, "label": label}
    columns = guess(source.columns(), source.peek(), {role: name for role, name in given.items() if name})
    tokenizer = None
    if model is not None:
        from lexmill.data.tokenizer import load_tokenizer
        from lexmill.fit.model import model_directory

        tokenizer = load_tokenizer(model_directory(model))
    report = check(source, other, columns, tokenizer=tokenizer, max_tokens=max_length if tokenizer else None)
    output.show(report.to_dict() if json else [*columns.lines(), *report.lines()], json=json)
    if not report.ok:
        raise typer.Exit(2)
