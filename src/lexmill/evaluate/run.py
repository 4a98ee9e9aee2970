"""A task's metrics over an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lexmill.engine.torch_engine import TorchEngine
from lexmill.tasks.base import Metrics, Record


@dataclass(frozen=True)
class Evaluation:
    """What an engine answered to labelled records, and how good that was.

    Args:
        metrics: see `Metrics`.
        rows: how many records were scored.
    """

    metrics: Metrics
    rows: int

    def to_dict(self) -> dict[str, Any]:
        """Flat for machines: every value by name, its interval under `intervals`, the tables under `tables`."""
        return {
            **self.metrics.values,
            "rows": self.rows,
            "intervals": {name: list(interval) for name, interval in self.metrics.intervals.items()},
            "tables": self.metrics.tables,
        }


def evaluate(
    engine: TorchEngine, records: Iterable[Record], *, progress: Callable[[int], None] | None = None
) -> Evaluation:
    """Answer every record and score the answers. A record that cannot be answered raises its error.

    Args:
        progress: told how many records are done.
    """
    asked: list[Record] = []
    answers: list[Any] = []
    for record, answer in engine.run_stream(records, labelled=True):
        if isinstance(answer, Exception):
            raise answer
        asked.append(record)
        answers.append(answer)
        if progress is not None:
            progress(len(asked))
    return Evaluation(engine.task.evaluate(answers, asked), len(asked))
