"""Two models on the same labelled rows: how much better one is, and whether that could be luck."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lexmill import metrics
from lexmill.engine import Ensemble, Runtime
from lexmill.errors import UserError
from lexmill.evaluate.run import answered
from lexmill.metrics import Difference
from lexmill.tasks.base import Metrics, Record


@dataclass(frozen=True)
class Comparison:
    """What two models gave to the same rows; differences are the second minus the first.

    Args:
        rows: how many both were scored on.
        first, second: the metrics of each.
        difference: of the mean score a row.
        p_mcnemar: where answers are right or wrong: how likely so many rows would fall to one side between equally good
            models (exact).
        only_first, only_second: rows that the one did better than the other.
        disagreements: the rows that they were scored most differently on: row, its columns, both answers and scores.
    """

    names: tuple[str, str]
    rows: int
    first: Metrics
    second: Metrics
    difference: Difference
    p_mcnemar: float | None
    only_first: int
    only_second: int
    disagreements: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return {
            "names": list(self.names),
            "rows": self.rows,
            "first": self.first.values,
            "second": self.second.values,
            "difference": asdict(self.difference),
            "p_mcnemar": self.p_mcnemar,
            "only_first": self.only_first,
            "only_second": self.only_second,
            "disagreements": self.disagreements,
        }

    def lines(self) -> list[str]:
        """For people."""
        d, (first, second) = self.difference, self.names
        low, high = d.interval
        lines = [f"{self.rows:,} rows; first: {first}, second: {second}"]
        for name in self.first.values:
            if name in self.second.values:
                a, b = self.first.values[name], self.second.values[name]
                lines.append(f"{name:<24} {a:.4f}  {b:.4f}  {b - a:+.4f}")
        lines.append(f"score a row: {d.value:+.4f} (95 % interval {low:+.4f} to {high:+.4f}, p {d.p:.3g})")
        if self.p_mcnemar is not None:
            lines.append(f"McNemar's exact p: {self.p_mcnemar:.3g}")
        lines.append(f"better only by the first: {self.only_first:,} rows, only by the second: {self.only_second:,}")
        for row in self.disagreements:
            lines.append(f"  row {row['row']}: {_short(row['columns'])}")
            lines.append(f"    first {_short(row['first'])}, second {_short(row['second'])}")
        return lines


def compare(
    first: Runtime | Ensemble,
    second: Runtime | Ensemble,
    records: Iterable[Record],
    *,
    names: tuple[str, str] = ("first", "second"),
    top: int = 20,
    progress: Callable[[int], None] | None = None,
    where: Callable[[int], str] | None = None,
) -> Comparison:
    """Let two models answer the same labelled rows.

    Args:
        top: how many disagreements to keep.
        progress, where: as in `answered`; rows are counted once a model.

    Raises:
        UserError: the tasks or their labels differ, or the task has no score for a row.
    """
    _refuse_different(first, second, names)
    asked, answers = answered(first, records, progress=progress, where=where)
    _, others = answered(second, asked, progress=progress, where=where)
    found = [engine.task.item_scores(a, asked) for engine, a in ((first, answers), (second, others))]
    if found[0] is None or found[1] is None:
        hint = "compare what `lexmill evaluate` says of each"
        raise UserError(f"the task '{first.task.name}' has no score for a single row", hint=hint)
    rows = np.flatnonzero(~np.isnan(found[0]) & ~np.isnan(found[1]))
    if not len(rows):
        raise UserError("no row could be scored by both", hint="are the labels in the column of training?")
    a, b = found[0][rows].astype(np.float64), found[1][rows].astype(np.float64)
    right_or_wrong = bool(np.isin(np.concatenate([a, b]), (0, 1)).all())
    far = np.argsort(-np.abs(b - a), kind="stable")[:top]
    return Comparison(
        names,
        len(rows),
        first.task.evaluate(answers, asked),
        second.task.evaluate(others, asked),
        metrics.paired_mean(a, b),
        metrics.mcnemar(a > 0, b > 0) if right_or_wrong else None,
        int((a > b).sum()),
        int((b > a).sum()),
        [
            {
                "row": int(rows[i]) + 1,
                "columns": dict(asked[rows[i]]),
                "first": {**_scalars(first.task.render(answers[rows[i]])), "row_score": float(a[i])},
                "second": {**_scalars(second.task.render(others[rows[i]])), "row_score": float(b[i])},
            }
            for i in far
            if a[i] != b[i]
        ],
    )


def _refuse_different(first: Runtime | Ensemble, second: Runtime | Ensemble, names: tuple[str, str]) -> None:
    a, b = first.task, second.task
    if a.name != b.name:
        what = f"'{names[0]}' does the task '{a.name}', '{names[1]}' the task '{b.name}'"
        raise UserError(what, hint="compare two artefacts of one task")
    ours, theirs = ({head: set(labels) for head, labels in task.labels().items()} for task in (a, b))
    if ours != theirs:
        other = next(head for head in {**ours, **theirs} if ours.get(head) != theirs.get(head))
        only = sorted(ours.get(other, set()) ^ theirs.get(other, set()))[:5]
        what = f"the labels of head '{other}' differ: {', '.join(only) or 'only one has it'}"
        raise UserError(what, hint="compare two artefacts fitted to the same labels")
    if a.state()["columns"] != b.state()["columns"]:
        what = f"they read different columns: {a.state()['columns']} and {b.state()['columns']}"
        raise UserError(what, hint="compare two artefacts fitted to the same columns")


def _scalars(shown: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that fit on a line."""
    return {name: value for name, value in shown.items() if isinstance(value, (str, int, float))}


def _short(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {str(v)[:80]!r}" for k, v in values.items())
