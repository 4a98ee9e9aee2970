"""`lexmill check` and `lexmill augment`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lexmill.cli import output


def check(
    data: Annotated[Path, typer.Argument(help="Labelled rows: CSV, TSV, JSONL (.gz, .xz), Parquet.")],
    test: Annotated[Path | None, typer.Option(help="Test rows, to look for overlap and unknown labels.")] = None,
    model: Annotated[str | None, typer.Option(help="Count tokens with its tokenizer: a directory, or minilm.")] = None,
    text: Annotated[str | None, typer.Option(help="The text column; guessed otherwise.")] = None,
    text_pair: Annotated[str | None, typer.Option(help="The second text's column, for pairs.")] = None,
    label: Annotated[str | None, typer.Option(help="The label column; guessed otherwise.")] = None,
    max_length: Annotated[int, typer.Option(help="With --model: report texts of more tokens than this.")] = 128,
    encoding: Annotated[str, typer.Option(help="Of text files.")] = "utf-8",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Pass over broken rows and count them.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Look at data before training on it. Reports rows, labels, duplicates, conflicts and overlap."""
    from lexmill import api

    report = api.check(
        data, test=test, model=model, text=text, text_pair=text_pair, label=label, max_length=max_length,
        encoding=encoding, skip_bad=skip_bad,
    )  # fmt: skip
    output.show(report.to_dict() if json else [*report.columns.lines(), *report.lines()], json=json)
    if not report.ok:
        raise typer.Exit(2)


def augment(
    data: Annotated[Path, typer.Argument(help="Rows: CSV, TSV, JSONL (.gz, .xz), Parquet.")],
    out: Annotated[Path, typer.Option(help="JSON lines to write; must not exist.")],
    how: Annotated[str, typer.Option(help="Edits: swap, delete, keyboard, synonym.")] = "swap,delete,keyboard",
    copies: Annotated[int, typer.Option(help="Changed copies a row.", min=1)] = 1,
    share: Annotated[float, typer.Option(help="Of the words, that an edit changes.")] = 0.1,
    synonyms: Annotated[Path | None, typer.Option(help="Groups of words, one a line, parted by commas.")] = None,
    there: Annotated[Path | None, typer.Option(help="Translate with this artefact in place of editing…")] = None,
    back: Annotated[Path | None, typer.Option(help="…and back with this one.")] = None,
    text: Annotated[str | None, typer.Option(help="The text column; guessed otherwise.")] = None,
    seed: Annotated[int, typer.Option(help="Another seed makes other copies.")] = 0,
    encoding: Annotated[str, typer.Option(help="Of text files.")] = "utf-8",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Pass over broken rows and count them.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make more rows of those there are. Texts are changed a little, or translated there and back."""
    from typing import Any, cast

    from lexmill import api

    edits = cast("Any", [edit.strip() for edit in how.split(",")])
    counts = api.augment(
        data, out=out, edits=edits, copies=copies, share=share, synonyms=synonyms, there=there, back=back, text=text,
        seed=seed, encoding=encoding, skip_bad=skip_bad,
    )  # fmt: skip
    lines = [f"{count:,} {name}" for name, count in counts.items()]
    output.show(counts if json else [*lines, f"wrote {out}"], json=json)
