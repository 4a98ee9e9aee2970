"""`lexmill predict`: rows in, one JSON object a line out."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from lexmill.data import open_source, read_lines
from lexmill.data.sources import Row
from lexmill.engine import TorchEngine
from lexmill.errors import UserError


def predict(
    artifact: Path,
    data: str,
    out: Path | None,
    columns: Mapping[str, str | None],
    *,
    encoding: str,
    skip_bad: bool,
) -> None:
    """Answer the rows of a file or of standard input in order. With `out`, the file appears only when it is whole."""
    if out is not None and out.exists():
        raise UserError("already exists", where=str(out), hint="give another --out, or remove it")
    engine = TorchEngine(artifact)
    if data == "-":
        rows, chunk = read_lines(sys.stdin.buffer, encoding=encoding), 1 if sys.stdin.isatty() else 256
    else:
        rows, chunk = iter(open_source(data, encoding=encoding, skip_bad=skip_bad)), 1024
    asked = _renamed(rows, engine, columns)
    if out is None:
        _write(engine, asked, chunk, sys.stdout)
        return
    partial = out.with_name(out.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            _write(engine, asked, chunk, file)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def _renamed(rows: Iterator[Row], engine: TorchEngine, columns: Mapping[str, str | None]) -> Iterator[dict[str, Any]]:
    """Records under the column names that the task was trained with."""
    trained: Mapping[str, str] = engine.task.state()["columns"]
    for row in rows:
        record = dict(row.values)
        for role, trained_name in trained.items():
            given = columns.get(role) or (trained_name if trained_name in record else role)
            if role in ("text", "text_pair"):
                if given not in record:
                    raise UserError(
                        f"line {row.line} has no column '{trained_name}'",
                        hint=f"it has: {', '.join(record)}; name one with --{role.replace('_', '-')}",
                    )
                record[trained_name] = record[given]
        yield record


def _write(engine: TorchEngine, records: Iterator[dict[str, Any]], chunk: int, file: TextIO) -> None:
    for record, answer in engine.run_stream(records, chunk=chunk):
        if isinstance(answer, Exception):
            raise answer
        shown = {name: record[name] for name in _texts(engine) if name in record}
        file.write(json.dumps({**shown, **engine.task.render(answer)}, ensure_ascii=False) + os.linesep)
        if chunk == 1:
            file.flush()


def _texts(engine: TorchEngine) -> list[str]:
    columns: Mapping[str, str] = engine.task.state()["columns"]
    return [column for role, column in columns.items() if role in ("text", "text_pair")]
