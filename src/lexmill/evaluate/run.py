"""A task's metrics over an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lexmill.artifact import Metric
from lexmill.engine import Ensemble, Runtime
from lexmill.errors import UserError
from lexmill.tasks.base import Metrics, Record


@dataclass(frozen=True)
class Evaluation:
    """What an engine answered to labelled records, and how good that was.

    Args:
        metrics: see `Metrics`.
        rows: how many records were scored.
        runtime: what computed the answers; see `Runtime.record`.
    """

    metrics: Metrics
    rows: int
    runtime: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def lines(self) -> list[str]:
        """For people: how many rows, and each value with its 95 % interval where there is one."""
        lines = [f"{self.rows:,} rows"]
        for name, value in self.metrics.values.items():
            interval = self.metrics.intervals.get(name)
            known = f"  (95 % interval {interval[0]:.4f} to {interval[1]:.4f})" if interval else ""
            lines.append(f"{name:<24} {value:.4f}{known}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Flat for machines: every value by name, its interval under `intervals`, the tables under `tables`."""
        return {
            **self.metrics.values,
            "rows": self.rows,
            "runtime": dict(self.runtime),
            "intervals": {name: list(interval) for name, interval in self.metrics.intervals.items()},
            "tables": self.metrics.tables,
        }


def evaluate(
    engine: Runtime | Ensemble,
    records: Iterable[Record],
    *,
    adapter: str | None = None,
    progress: Callable[[int], None] | None = None,
    where: Callable[[int], str] | None = None,
) -> Evaluation:
    """Answer every record and score the answers; see `answered`."""
    asked, answers = answered(engine, records, adapter=adapter, progress=progress, where=where)
    return Evaluation(engine.task_for(adapter).evaluate(answers, asked), len(asked), engine.record)


def answered(
    engine: Runtime | Ensemble,
    records: Iterable[Record],
    *,
    adapter: str | None = None,
    progress: Callable[[int], None] | None = None,
    where: Callable[[int], str] | None = None,
) -> tuple[list[Record], list[Any]]:
    """Labelled records and the answers to them. A record that cannot be answered raises its error.

    Args:
        adapter: which answers, where the engine has several.
        progress: told how many records are done.
        where: the place of a record by its index, for errors.
    """
    asked: list[Record] = []
    answers: list[Any] = []
    for record, answer in engine.run_stream(records, labelled=True, adapter=adapter):
        if isinstance(answer, UserError) and where is not None:
            raise UserError(answer.message, where=where(len(asked)), hint=answer.hint) from answer
        if isinstance(answer, Exception):
            raise answer
        asked.append(record)
        answers.append(answer)
        if progress is not None:
            progress(len(asked))
    return asked, answers


def metrics_of(evaluation: Evaluation) -> dict[str, Metric]:
    """As a manifest has them."""
    found = evaluation.metrics
    return {name: Metric(value=value, interval=found.intervals.get(name)) for name, value in found.values.items()}
