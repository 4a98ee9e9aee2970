"""`lexmill tokenizer`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lexmill.cli import output


def tokenizer(
    data: Annotated[Path, typer.Argument(help="Rows of text: CSV, TSV, JSONL, TXT (.gz, .xz), Parquet.")],
    out: Annotated[Path | None, typer.Option(help="The directory to write; must not exist.")] = None,
    kind: Annotated[str, typer.Option(help="bpe (of bytes), wordpiece or unigram.")] = "bpe",
    vocab_size: Annotated[int, typer.Option(help="Tokens, special ones included.")] = 8000,
    special: Annotated[
        str | None, typer.Option(help="Whose special tokens: bert, gpt2, roberta or t5; by the kind otherwise.")
    ] = None,
    lowercase: Annotated[
        bool | None, typer.Option("--lowercase/--cased", help="Drop upper case and accents; wordpiece does otherwise.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="The text column; may be given again for more; guessed otherwise.")
    ] = None,
    encoding: Annotated[str, typer.Option(help="Of text files.")] = "utf-8",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Pass over broken rows and count them.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Train a tokenizer on text. Writes a directory that is read by this program and by transformers."""
    from lexmill import api
    from lexmill.errors import UserError

    if out is None:
        raise UserError("where should the tokenizer go?", where="command line", hint="give --out DIR")
    with output.counter("reading", quiet=quiet or json) as progress:
        found = api.tokenizer(
            data, out=out, kind=kind, vocab_size=vocab_size, special=special, lowercase=lowercase, text=text or (),
            encoding=encoding, skip_bad=skip_bad, progress=progress,
        )  # fmt: skip
    output.show(found.to_dict() if json else found.lines(), json=json)
