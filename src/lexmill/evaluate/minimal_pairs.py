"""Whether a language model finds the grammatical one of two sentences likelier (BLiMP, Warstadt et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from lexmill import metrics
from lexmill.engine.torch_engine import TorchEngine
from lexmill.errors import UserError
from lexmill.tasks.base import Metrics, Record

EVIDENCE = "nll"
"""What a task's evidence of a text must hold: its negative log-likelihood, in nats."""


def minimal_pairs(
    engine: TorchEngine, pairs: Iterable[Mapping[str, str]], *, column: str = "text", phenomenon: str = "uid"
) -> Metrics:
    """`accuracy`, the share of pairs whose `good` sentence is likelier than its `bad` one, with an interval, and a
    table of it by phenomenon, worst first.

    Args:
        engine: of a task that says how likely a text is, such as `pretrain`.
        column: the one in which the task reads a text.
        phenomenon: the key of a pair that says what it is about.

    Raises:
        UserError: there are no pairs, or the task does not say how likely a text is.
    """
    rows = list(pairs)
    if not rows:
        raise UserError("there are no pairs to compare", hint="each has a 'good' and a 'bad' sentence")
    records: list[Record] = [{column: row[side]} for row in rows for side in ("good", "bad")]
    nll: list[float] = []
    for _, answer in engine.run_stream(records, labelled=True):
        if isinstance(answer, Exception):
            raise answer
        evidence = engine.task.evidence(answer)
        if EVIDENCE not in evidence:
            hint = "ask a model of the task 'pretrain'"
            raise UserError(f"the task '{engine.task.name}' does not say how likely a text is", hint=hint)
        nll.append(evidence[EVIDENCE])
    good, bad = np.array(nll).reshape(-1, 2).T
    right = good < bad
    groups: dict[str, list[bool]] = {}
    for row, one in zip(rows, right.tolist(), strict=True):
        groups.setdefault(str(row.get(phenomenon, "all")), []).append(one)
    table = [
        {"phenomenon": name, "accuracy": sum(found) / len(found), "pairs": len(found)} for name, found in groups.items()
    ]
    table.sort(key=lambda entry: entry["accuracy"])
    return Metrics(
        {"accuracy": float(right.mean())}, {"accuracy": metrics.accuracy_interval(right)}, {"phenomena": table}
    )
