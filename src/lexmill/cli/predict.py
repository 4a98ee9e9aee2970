"""`lexmill predict`: rows in, one JSON object a line out."""

from __future__ import annotations

import json
import queue
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from lexmill.artifact import refuse_existing
from lexmill.data import open_source, read_lines
from lexmill.data.columns import flag
from lexmill.data.sources import Row
from lexmill.data.write import write_lines
from lexmill.engine import Ensemble, Runtime, open_engine
from lexmill.errors import UserError

_CHUNK = 1024
_MOST_WAITING = 256


def predict(
    artifacts: Sequence[Path],
    data: str,
    out: Path | None,
    columns: Mapping[str, str | None],
    *,
    adapter: str | None,
    engine: str | None,
    encoding: str,
    skip_bad: bool,
) -> None:
    """Answer the rows of a file or of standard input in order, by one model or by several together. With `out`, the
    file appears only when it is whole."""
    if out is not None:
        refuse_existing(out, resume=True)
    if data == "-":
        name, groups = "stdin", _as_they_come(_standard_input(encoding))
    else:
        name, groups = data, _in_chunks(open_source(data, encoding=encoding, skip_bad=skip_bad))
    engines = [open_engine(artifact, engine) for artifact in artifacts]
    answering = engines[0] if len(engines) == 1 else Ensemble(engines)
    answers = _answers(answering, adapter, groups, columns, lambda line: f"{name}:{line}")
    if out is None:
        _write(answers, sys.stdout)
    else:
        write_lines(answers, out)


def _standard_input(encoding: str) -> Iterator[Row]:
    # A file of its own: while a thread waits in it, `sys.stdin` could not be closed at exit.
    with open(sys.stdin.fileno(), "rb", closefd=False) as stream:
        yield from read_lines(stream, encoding=encoding)


def _in_chunks(rows: Iterable[Row]) -> Iterator[list[Row]]:
    remaining = iter(rows)
    while chunk := list(islice(remaining, _CHUNK)):
        yield chunk


def _as_they_come(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """Whatever rows have arrived, so that nobody who types or pipes a line waits for the next one."""
    waiting: queue.Queue[Row | BaseException | None] = queue.Queue(_MOST_WAITING)

    def read() -> None:
        try:
            for row in rows:
                waiting.put(row)
            waiting.put(None)
        except Exception as fault:  # noqa: BLE001 - raised where the rows are asked for
            waiting.put(fault)

    threading.Thread(target=read, name="lexmill-stdin", daemon=True).start()
    end: Row | BaseException | None = None
    seen, ended = 0, False
    while not ended:
        group: list[Row] = []
        while not group or (len(group) < _CHUNK and not waiting.empty()):
            item = waiting.get()
            if not isinstance(item, Row):
                end, ended = item, True
                break
            group.append(item)
        seen += len(group)
        if group:
            yield group
    if isinstance(end, BaseException):
        raise end
    if not seen:
        raise UserError("nothing came", where="stdin", hint="pipe in JSON lines, or one text a line, or name a file")


def _answers(
    engine: Runtime | Ensemble,
    adapter: str | None,
    groups: Iterator[list[Row]],
    columns: Mapping[str, str | None],
    where: Callable[[int], str],
) -> Iterator[list[str]]:
    """The lines to write, group by group."""
    task = engine.task_for(adapter)
    trained: Mapping[str, str] = task.state()["columns"]
    inputs = {role.name: trained[role.name] for role in task.roles if role.input and role.name in trained}
    for role in columns:
        if role not in inputs and columns[role] is not None:
            hint = f"this model reads: {', '.join(inputs)}"
            raise UserError(f"the model reads no '{role}'", where="command line", hint=hint)
    blank = {role.name for role in engine.task.roles if role.blank}
    for rows in groups:
        records = [_renamed(row, inputs, columns, blank, where) for row in rows]
        lines: list[str] = []
        for row, (record, answer) in zip(
            rows, engine.run_stream(records, chunk=len(records), adapter=adapter), strict=True
        ):
            if isinstance(answer, UserError):
                raise UserError(answer.message, where=where(row.line), hint=answer.hint) from answer
            if isinstance(answer, Exception):
                raise answer
            shown = {name: record[name] for name in inputs.values() if name in record}
            lines.append(json.dumps({**shown, **task.render(answer)}, ensure_ascii=False) + "\n")
        yield lines


def _renamed(
    row: Row,
    inputs: Mapping[str, str],
    columns: Mapping[str, str | None],
    blank: Collection[str],
    where: Callable[[int], str],
) -> dict[str, Any]:
    """The record under the column names that the task was trained with."""
    record = dict(row.values)
    for role, name in inputs.items():
        given = columns.get(role) or (name if name in record else role)
        if given not in record and role in blank and not columns.get(role):
            continue
        if given not in record:
            hint = f"it has: {', '.join(record)}; name one with {flag(role)}"
            raise UserError(f"no column '{columns.get(role) or name}'", where=where(row.line), hint=hint)
        record[name] = record[given]
    return record


def _write(answers: Iterator[list[str]], file: TextIO) -> None:
    for lines in answers:
        file.writelines(lines)
        file.flush()
