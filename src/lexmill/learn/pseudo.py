"""Labels from a model, for rows that have none (Lee 2013)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lexmill.artifact import refuse_existing
from lexmill.data import open_source
from lexmill.data.write import write_rows
from lexmill.engine import Ensemble, Runtime
from lexmill.errors import UserError


def label(
    engine: Runtime | Ensemble, data: Path, out: Path, min_score: float, *, encoding: str, skip_bad: bool
) -> dict[str, Any]:
    """Write the rows of which the model is sure, with the label it gives them.

    Raises:
        UserError: a model whose answers have no label and score, a row that cannot be answered, or no row of which the
            model is sure.
    """
    refuse_existing(out, resume=True)
    if not 0 <= min_score <= 1:
        raise UserError(f"{min_score} is no probability", where="--min-score", hint="give 0 to 1")
    source = open_source(data, encoding=encoding, skip_bad=skip_bad)
    columns = engine.task.state()["columns"]
    inputs = [columns[role.name] for role in engine.task.roles if role.input and role.name in columns]
    target = columns.get("label", "label")
    counts: Counter[str] = Counter()
    read = 0

    def sure() -> Iterator[dict[str, Any]]:
        nonlocal read
        for record, answer in engine.run_stream(row.values for row in source):
            read += 1
            if isinstance(answer, Exception):
                raise answer
            shown = engine.task.render(answer)
            given, score = shown.get("label"), shown.get("score")
            if not isinstance(given, str) or score is None:
                hint = "label with a model of one label a text"
                raise UserError(f"answers of this '{engine.task.name}' have no label and score", hint=hint)
            if score >= min_score:
                counts[given] += 1
                yield {**{name: record[name] for name in inputs}, target: given, "score": score}
        if not counts:
            hint = "lower --min-score, or train the model longer"
            raise UserError(f"the model is sure of none of {read} rows", where=str(data), hint=hint)

    written = write_rows(sure(), out)
    return {"rows": read, "labelled": written, "labels": dict(counts.most_common())}
