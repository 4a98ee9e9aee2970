"""`lexmill compress`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from lexmill.cli import output

_NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*")
TIMES: Mapping[str, float] = {"us": 0.001, "ms": 1, "s": 1000}
SIZES: Mapping[str, float] = {"kB": 0.001, "KB": 0.001, "MB": 1, "GB": 1000}
ENERGIES: Mapping[str, float] = {"uJ": 0.001, "mJ": 1, "J": 1000}
SPANS: Mapping[str, float] = {"s": 1 / 60, "min": 1, "h": 60}


def quantity(text: str | None, units: Mapping[str, float], flag: str, example: str) -> float | None:
    """`10ms` as a number in the unit that counts 1. A `UserError` for what has no unit, or none of these."""
    from lexmill.errors import UserError

    if text is None:
        return None
    match = _NUMBER.fullmatch(text)
    if match is None or match[2] not in units:
        raise UserError(f"'{text}' is not a number and a unit", where=flag, hint=f"for example {flag} {example}")
    return float(match[1]) * units[match[2]]


def compress(
    artifact: Annotated[Path, typer.Argument(help="An artefact.")],
    out: Annotated[Path | None, typer.Option(help="The artefact to write; must not exist.")] = None,
    step: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD[,KEY=VALUE…]", help="One step, e.g. distil,layers=3; may be repeated."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="The chain or the goal, and all else, in TOML.")] = None,
    max_drop: Annotated[float | None, typer.Option(help="Largest loss of the mean score a row, e.g. 0.01.")] = None,
    p50: Annotated[str | None, typer.Option(help="Search: the most for one text alone, e.g. 5ms.")] = None,
    p99: Annotated[str | None, typer.Option(help="Search: the same of 99 in 100 texts, e.g. 10ms.")] = None,
    size: Annotated[str | None, typer.Option(help="Search: the most that is loaded, e.g. 20MB.")] = None,
    rate: Annotated[float | None, typer.Option(help="Search: the least texts a second, as a stream.")] = None,
    energy: Annotated[str | None, typer.Option(help="Search: the most for a text of a stream, e.g. 5mJ.")] = None,
    prefer: Annotated[str | None, typer.Option(help="Search: accuracy, speed or size, among what is within.")] = None,
    without: Annotated[list[str] | None, typer.Option(help="Search: a method to do without; may be repeated.")] = None,
    runtime: Annotated[list[str] | None, typer.Option(help="Search: a runtime to try; may be repeated.")] = None,
    target: Annotated[str, typer.Option(help="Search: where it is measured.")] = "cpu",
    epochs: Annotated[int | None, typer.Option(help="Search: of training, in place of each method's own.")] = None,
    budget: Annotated[str | None, typer.Option(help="Search: how long, e.g. 20min.")] = None,
    search: Annotated[Path | None, typer.Option(help="Search: the folder of what is tried; OUT.search.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Search: use what that folder holds already.")] = False,
    data: Annotated[Path | None, typer.Option(help="Training rows; those of fit otherwise.")] = None,
    validation: Annotated[Path | None, typer.Option(help="Rows to choose on; those of fit otherwise.")] = None,
    test: Annotated[Path | None, typer.Option(help="Rows for the proof; those of fit otherwise.")] = None,
    unlabelled: Annotated[Path | None, typer.Option(help="Rows without labels to learn from.")] = None,
    seed: Annotated[int | None, typer.Option(help="Fixes which rows are held out, and all that is drawn.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Make a model smaller or faster. By steps that you name, or by a search for them under --max-drop and what else is
    asked. Measures before and after, and proves on rows that nothing was chosen on what it costs."""
    from lexmill import api
    from lexmill.errors import UserError

    if out is None:
        raise UserError("where should the artefact go?", where="command line", hint="give --out runs/NAME")
    if target != "cpu":
        hint = "leave it out: models are measured on this machine's CPU"
        raise UserError(f"nothing can be measured on '{target}' here", where="--target", hint=hint)
    goal: dict[str, Any] = {
        "p50_ms": quantity(p50, TIMES, "--p50", "5ms"),
        "p99_ms": quantity(p99, TIMES, "--p99", "10ms"),
        "size_mb": quantity(size, SIZES, "--size", "20MB"),
        "texts_per_second": rate,
        "energy_mj": quantity(energy, ENERGIES, "--energy", "5mJ"),
        "prefer": prefer,
        "without": without or None,
        "runtimes": runtime or None,
        "epochs": epochs,
        "budget_minutes": quantity(budget, SPANS, "--budget", "20min"),
    }
    result = api.compress(
        artifact, out=out, steps=step or (), config=config, max_drop=max_drop, goal=goal, data=data,
        validation=validation, test=test, unlabelled=unlabelled, seed=seed, search=search, resume=resume,
        watch=output.watch(quiet=quiet or json),
    )  # fmt: skip
    output.show(result.to_dict() if json else result.lines(), json=json)
