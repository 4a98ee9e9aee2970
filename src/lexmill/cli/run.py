"""`lexmill evaluate`, `predict` and `serve`: asking a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lexmill.cli import output

Engine = Annotated[
    str | None,
    typer.Option(
        "--engine",
        help="torch or compiled, or onnx or openvino for what export wrote; what the artefact names otherwise.",
    ),
]


def evaluate(
    artifact: Annotated[Path, typer.Argument(help="An artefact.")],
    data: Annotated[Path, typer.Argument(help="Labelled rows.")],
    adapter: Annotated[str | None, typer.Option(help="Which answers, where the artefact has several.")] = None,
    others: Annotated[
        list[Path] | None, typer.Option("--with", metavar="ARTEFACT", help="One more of an ensemble; may be repeated.")
    ] = None,
    engine: Engine = None,
    encoding: Annotated[str, typer.Option(help="Of text files.")] = "utf-8",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Pass over broken rows and count them.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write an HTML report here.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Score a model on labelled data, with confidence intervals."""
    from lexmill import api

    with output.counter("evaluating", quiet=quiet or json) as progress:
        found = api.evaluate(
            artifact,
            data,
            adapter=adapter,
            others=others or (),
            engine=engine,
            encoding=encoding,
            skip_bad=skip_bad,
            report=report,
            progress=progress,
        )
    output.show(found.to_dict() if json else found.lines(), json=json)


def compare(
    first: Annotated[Path, typer.Argument(help="An artefact.")],
    second: Annotated[Path, typer.Argument(help="Another one of the same task and labels.")],
    data: Annotated[Path, typer.Argument(help="Labelled rows.")],
    top: Annotated[int, typer.Option(help="How many disagreements to show.", min=0)] = 20,
    encoding: Annotated[str, typer.Option(help="Of text files.")] = "utf-8",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Pass over broken rows and count them.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Compare two models on the same labelled rows. Says how much better the second is, how sure that is, and where."""
    from lexmill import api

    with output.counter("comparing", quiet=quiet or json) as progress:
        found = api.compare(first, second, data, top=top, encoding=encoding, skip_bad=skip_bad, progress=progress)
    output.show(found.to_dict() if json else found.lines(), json=json)


def predict(
    artifact: Annotated[Path, typer.Argument(help="An artefact.")],
    data: Annotated[str, typer.Argument(help="Rows, or - for standard input: JSON lines, or one text a line.")] = "-",
    out: Annotated[Path | None, typer.Option(help="Write here in place of standard output; must not exist.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Which answers, where the artefact has several.")] = None,
    text: Annotated[str | None, typer.Option(help="The text column; the one of training otherwise.")] = None,
    text_pair: Annotated[str | None, typer.Option(help="The second text's column, for pairs.")] = None,
    column: Annotated[
        list[str] | None, typer.Option(metavar="ROLE=COLUMN", help="Any other column; may be repeated.")
    ] = None,
    others: Annotated[
        list[Path] | None, typer.Option("--with", metavar="ARTEFACT", help="One more of an ensemble; may be repeated.")
    ] = None,
    engine: Engine = None,
    encoding: Annotated[str, typer.Option(help="Of text files.")] = "utf-8",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Pass over broken rows and count them.")] = False,
) -> None:
    """Answer rows as a stream, one JSON object a line."""
    from lexmill.cli.predict import predict

    columns = {"text": text, "text_pair": text_pair, **output.columns(column)}
    members = [artifact, *(others or ())]
    predict(members, data, out, columns, adapter=adapter, engine=engine, encoding=encoding, skip_bad=skip_bad)


def serve(
    artifacts: Annotated[list[Path], typer.Argument(help="One or more artefacts.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 picks a free one.", min=0, max=65535)] = 8100,
    engine: Engine = None,
) -> None:
    """Serve artefacts over HTTP. POST /v1/classify, /v1/generate; GET /health, /ready, /metrics, /openapi.json."""
    from lexmill.serve import serve

    print("loading", ", ".join(map(str, artifacts)), file=sys.stderr)
    serve(artifacts, host=host, port=port, runtime=engine)
