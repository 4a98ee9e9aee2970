"""How much worse a compressed model is, on rows that nothing was chosen on, and whether that is proved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from lexmill import metrics
from lexmill.engine import Runtime
from lexmill.errors import UserError
from lexmill.evaluate import Evaluation, answered
from lexmill.metrics import NORMAL, Difference
from lexmill.tasks import Record


@dataclass(frozen=True)
class Proof:
    """The drop of the mean score a row from the source to the compressed model; positive where that is worse.

    Args:
        interval: its paired 95 % interval (`metrics.paired_mean`).
        rows: how many were scored.
        allowed: the largest drop that was allowed, if one was.
        rows_needed: about how many rows would prove a drop of this size to be within what is allowed; None where it is
            proved already, where nothing was asked, or where no number of rows would.
        where: which rows these are.
    """

    drop: float
    interval: tuple[float, float]
    rows: int
    where: str
    allowed: float | None = None
    rows_needed: int | None = None

    @property
    def holds(self) -> bool:
        """Whether the drop is within what is allowed with 97.5 % confidence, or nothing was asked."""
        return self.allowed is None or self.interval[1] <= self.allowed

    def lines(self) -> list[str]:
        low, high = self.interval
        said = f"score lost: {self.drop:+.4f} (paired 95 % interval {low:+.4f} to {high:+.4f}) on {self.rows:,} rows"
        lines = [f"{said}: {self.where}"]
        if self.allowed is not None:
            verdict = "proved to be within" if self.holds else "not proved to be within"
            lines.append(f"{verdict} the {self.allowed:g} that may be lost")
        if self.rows_needed is not None:
            lines.append(f"to prove a loss of this size, about {self.rows_needed:,} rows are needed")
        return lines

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "interval": list(self.interval), "holds": self.holds}


def prove(
    source: Runtime, compressed: Runtime, rows: Sequence[Record], *, where: str, allowed: float | None
) -> tuple[Proof | None, Evaluation]:
    """Let both models answer the rows, each once.

    Returns:
        The proof, or None where the task has no score for a single row; and the evaluation of the compressed model.

    Raises:
        UserError: a drop was to be kept within bounds, and the task has no score for a single row.
    """
    before, _ = scored(source, rows)
    after, evaluation = scored(compressed, rows)
    if before is None or after is None:
        if allowed is not None:
            hint = "leave --max-drop out, and compare what is measured"
            raise UserError(f"the task '{source.task.name}' has no score for a single row", hint=hint)
        return None, evaluation
    return judge(before, after, where=where, allowed=allowed), evaluation


def scored(engine: Runtime, rows: Sequence[Record]) -> tuple[Float[np.ndarray, "row"] | None, Evaluation]:
    """The score of each row, None where the task has none; and the evaluation of all."""
    _, answers = answered(engine, rows)
    return engine.task.item_scores(answers, rows), Evaluation(engine.task.evaluate(answers, rows), len(rows))


def judge(
    before: Float[np.ndarray, "row"], after: Float[np.ndarray, "row"], *, where: str, allowed: float | None
) -> Proof:
    """The drop from the scores before to those after, over the rows that both could score. A `UserError` where there
    are none."""
    both = ~np.isnan(before) & ~np.isnan(after)
    old, new = before[both].astype(np.float64), after[both].astype(np.float64)
    if not len(old):
        raise UserError("no row could be scored by both", hint="are the labels in the column of training?")
    lost = metrics.paired_mean(new, old)
    return _judged(lost, float((old - new).std()), len(old), where, allowed)


def _judged(lost: Difference, deviation: float, rows: int, where: str, allowed: float | None) -> Proof:
    needed = None
    if allowed is not None and lost.value < allowed < lost.interval[1]:
        room = allowed - lost.value
        needed = math.ceil(NORMAL**2 * max(deviation**2 / room**2, (1 - room) / room))
    return Proof(lost.value, lost.interval, rows, where, allowed, needed)
