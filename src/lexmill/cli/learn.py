"""`lexmill search`, `lexmill label` and `lexmill mine`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lexmill.cli import output


def search(
    train: Annotated[Path | None, typer.Argument(help="Labelled rows: CSV, TSV, JSONL (.gz, .xz), Parquet.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder of the search.")] = None,
    try_: Annotated[
        list[str] | None,
        typer.Option("--try", metavar="KEY=VALUES", help="1e-5..1e-3:log, 2..6 or 16,32; once for each key."),
    ] = None,
    trials: Annotated[int, typer.Option(help="How many settings are tried.", min=1)] = 20,
    jobs: Annotated[int, typer.Option(help="Processes at a time, which share the cores.", min=1)] = 1,
    config: Annotated[Path | None, typer.Option(help="A recipe in TOML, for all that is not searched.")] = None,
    task: Annotated[str | None, typer.Option(help="As for fit.")] = None,
    model: Annotated[str | None, typer.Option(help="Hugging Face directory, artefact, or minilm.")] = None,
    validation: Annotated[Path | None, typer.Option(help="Rows to compare runs by.")] = None,
    test: Annotated[Path | None, typer.Option(help="Rows to test the best run on, once.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any other key; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sampler.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted search.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Find good settings by training with many. Keeps the best run, and tests that one."""
    from lexmill import api
    from lexmill.errors import UserError
    from lexmill.learn import parse_space

    if out is None:
        raise UserError("where should the search go?", where="command line", hint="give --out runs/NAME")
    result = api.search(
        train, out=out, space=parse_space(try_ or []), trials=trials, jobs=jobs, config=config, task=task, model=model,
        validation=validation, test=test, set=set_ or [], seed=seed, resume=resume,
        watch=output.watch(quiet=quiet or json),
    )  # fmt: skip
    output.show(result.to_dict() if json else result.lines(), json=json)


def label(
    artifact: Annotated[Path, typer.Argument(help="An artefact.")],
    data: Annotated[Path, typer.Argument(help="Rows without labels.")],
    out: Annotated[Path, typer.Option(help="JSON lines to write; must not exist.")],
    min_score: Annotated[float, typer.Option(help="Leave out rows of which the model is less sure.")] = 0.9,
    others: Annotated[
        list[Path] | None, typer.Option("--with", metavar="ARTEFACT", help="One more of an ensemble; may be repeated.")
    ] = None,
    encoding: Annotated[str, typer.Option(help="Of text files.")] = "utf-8",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Pass over broken rows and count them.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Label rows with a model, where it is sure. What it writes can be trained on."""
    from lexmill import api

    found = api.label(
        artifact, data, out=out, min_score=min_score, others=others or (), encoding=encoding, skip_bad=skip_bad
    )
    said = f"{found['labelled']:,} of {found['rows']:,} rows labelled, {len(found['labels']):,} labels; wrote {out}"
    output.show(found if json else [said], json=json)


def mine(
    model: Annotated[str, typer.Argument(help="An artefact of the task embed, a Hugging Face directory, or minilm.")],
    data: Annotated[Path, typer.Argument(help="Pairs of texts: CSV, TSV, JSONL (.gz, .xz), Parquet.")],
    out: Annotated[Path, typer.Option(help="JSON lines to write; must not exist.")],
    negatives: Annotated[int, typer.Option(help="The most a row gets.", min=1)] = 4,
    skip_top: Annotated[int, typer.Option(help="Pass over so many of the most similar.", min=0)] = 0,
    margin: Annotated[
        float, typer.Option(help="Share by which a negative's cosine is below that of the row's own passage.")
    ] = 0.05,
    column: Annotated[
        list[str] | None, typer.Option("--column", metavar="ROLE=COLUMN", help="As for fit; guessed otherwise.")
    ] = None,
    encoding: Annotated[str, typer.Option(help="Of text files.")] = "utf-8",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Pass over broken rows and count them.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Find hard negatives for pairs of texts. What it writes, fit learns embed from."""
    from lexmill import api

    found = api.mine(
        model, data, out=out, negatives=negatives, skip_top=skip_top, margin=margin, column=output.columns(column),
        encoding=encoding, skip_bad=skip_bad, watch=output.watch(quiet=quiet or json),
    )  # fmt: skip
    said = f"{found['mined']:,} negatives for {found['rows']:,} rows, of which {found['short']:,} have fewer than asked"
    output.show(found if json else [said, f"wrote {out}"], json=json)
