"""Classification metrics with confidence intervals and the tables that reports show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from lexmill import metrics
from lexmill.tasks.base import Metrics


def single_label(
    probabilities: Float[np.ndarray, "item label"], gold: Int[np.ndarray, "item"], labels: Sequence[str]
) -> Metrics:
    """One label an item."""
    predicted = probabilities.argmax(-1)
    confidence, correct = probabilities.max(-1), predicted == gold
    counts = metrics.count(gold, predicted, len(labels))
    macro = metrics.f1(counts, "macro")
    return Metrics(
        values={
            "accuracy": metrics.accuracy(gold, predicted),
            "macro_f1": macro,
            "f1": metrics.f1(counts, "weighted"),
            "ece": metrics.expected_calibration_error(confidence, correct),
            "brier": metrics.brier_score(probabilities, gold),
        },
        intervals={
            "accuracy": metrics.accuracy_interval(correct),
            "macro_f1": metrics.f1_interval(gold, predicted, "macro"),
        },
        tables={
            "per_class": metrics.per_class(counts, labels),
            "confused": metrics.confused(metrics.confusion(gold, predicted, len(labels)), labels),
            "calibration": metrics.reliability(confidence, correct),
        },
    )


def multi_label(
    probabilities: Float[np.ndarray, "item label"],
    gold: Float[np.ndarray, "item label"],
    labels: Sequence[str],
    threshold: float,
) -> Metrics:
    """Any number of labels an item; `accuracy` is the share of items with exactly the right set."""
    truth, predicted = gold > 0, probabilities >= threshold
    counts = metrics.count_multilabel(truth, predicted)
    right = (truth == predicted).all(1)
    return Metrics(
        values={
            "accuracy": metrics.exact_match(truth, predicted),
            "macro_f1": metrics.f1(counts, "macro"),
            "f1": metrics.f1(counts, "micro"),
            "brier": metrics.brier_score(probabilities, truth),
        },
        intervals={
            "accuracy": metrics.accuracy_interval(right),
            "macro_f1": metrics.multilabel_f1_interval(truth, predicted, "macro"),
            "f1": metrics.multilabel_f1_interval(truth, predicted, "micro"),
        },
        tables={"per_class": metrics.per_class(counts, labels)},
    )


def combine(heads: Mapping[str, Metrics]) -> Metrics:
    """Several heads in one: each name prefixed by `head/`, and the mean over heads under the plain name."""
    shared = [name for name in next(iter(heads.values())).values if all(name in m.values for m in heads.values())]
    return Metrics(
        values={
            **{name: float(np.mean([m.values[name] for m in heads.values()])) for name in shared},
            **{f"{head}/{name}": value for head, m in heads.items() for name, value in m.values.items()},
        },
        intervals={f"{head}/{name}": value for head, m in heads.items() for name, value in m.intervals.items()},
        tables={f"{head}/{name}": rows for head, m in heads.items() for name, rows in m.tables.items()},
    )
