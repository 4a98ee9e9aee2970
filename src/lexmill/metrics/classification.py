"""Accuracy, F1 and their tables, for one label an item or several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, Num

Average = Literal["macro", "micro", "weighted"]


@dataclass(frozen=True)
class Counts:
    """All that precision, recall and F1 need. Leading axes, such as one of resamples, are allowed.

    Args:
        hit: per class, items that have it and were given it.
        support: per class, items that have it.
        predicted: per class, items that were given it.
    """

    hit: Num[np.ndarray, "*batch cls"]
    support: Num[np.ndarray, "*batch cls"]
    predicted: Num[np.ndarray, "*batch cls"]


def confusion(
    truth: Int[np.ndarray, "item"], predicted: Int[np.ndarray, "item"], num_classes: int
) -> Int[np.ndarray, "cls cls"]:
    """How often class `row` was taken for class `column`. Raises ValueError for a class outside `num_classes`."""
    _check(truth, predicted)
    if min(truth.min(), predicted.min()) < 0 or max(truth.max(), predicted.max()) >= num_classes:
        raise ValueError(f"classes must be from 0 to {num_classes - 1}")
    cells = np.bincount(truth.astype(np.int64) * num_classes + predicted, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def count(truth: Int[np.ndarray, "item"], predicted: Int[np.ndarray, "item"], num_classes: int) -> Counts:
    """Counts where each item has one class."""
    matrix = confusion(truth, predicted, num_classes)
    return Counts(np.diagonal(matrix), matrix.sum(1), matrix.sum(0))


def count_multilabel(truth: Bool[np.ndarray, "item cls"], predicted: Bool[np.ndarray, "item cls"]) -> Counts:
    """Counts where each item has any number of classes."""
    _check(truth, predicted)
    return Counts((truth & predicted).sum(0), truth.sum(0), predicted.sum(0))


def accuracy(truth: Int[np.ndarray, "item"], predicted: Int[np.ndarray, "item"]) -> float:
    """The share of items that were given their class."""
    _check(truth, predicted)
    return float((truth == predicted).mean())


def exact_match(truth: Bool[np.ndarray, "item cls"], predicted: Bool[np.ndarray, "item cls"]) -> float:
    """The share of items that were given all of their classes and no other (subset accuracy)."""
    _check(truth, predicted)
    return float((truth == predicted).all(1).mean())


def f1(counts: Counts, average: Average) -> float:
    """F1 over all classes.

    A class that no item has and none was given has no F1 and does not count (scikit-learn's default for single labels).
    Where that is so of all classes, the result is 0.

    Args:
        average: `macro`, the mean over classes; `micro`, from the counts of all classes together; `weighted`, the
            mean over classes weighted by support.
    """
    return float(f1_each(counts, average))


def f1_each(counts: Counts, average: Average) -> Float[np.ndarray, "*batch"]:
    """`f1` along the last axis, for many counts at once."""
    hit, size = counts.hit, counts.support + counts.predicted
    if average == "micro":
        return _ratio(2 * hit.sum(-1), size.sum(-1))
    scores = _ratio(2 * hit, size)
    weights = (size > 0) if average == "macro" else counts.support
    return _ratio((scores * weights).sum(-1), weights.sum(-1))


def per_class(counts: Counts, labels: Sequence[str]) -> list[dict[str, Any]]:
    """One row a class: precision, recall, F1 (0 where undefined), how many items have it, how many were given it."""
    precision = _ratio(counts.hit, counts.predicted)
    recall = _ratio(counts.hit, counts.support)
    score = _ratio(2 * counts.hit, counts.support + counts.predicted)
    return [
        {
            "label": label,
            "precision": float(precision[i]),
            "recall": float(recall[i]),
            "f1": float(score[i]),
            "support": int(counts.support[i]),
            "predicted": int(counts.predicted[i]),
        }
        for i, label in enumerate(labels)
    ]


def confused(matrix: Int[np.ndarray, "cls cls"], labels: Sequence[str], top: int = 20) -> list[dict[str, Any]]:
    """The pairs of classes most often confused, most frequent first: which was taken for which, how often, and for
    what share of the items that have the true class."""
    wrong = matrix * ~np.eye(len(matrix), dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[:top]
    rows: list[dict[str, Any]] = []
    for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True):
        times = int(wrong[row, column])
        if times:
            share = times / int(matrix[row].sum())
            rows.append({"truth": labels[row], "predicted": labels[column], "count": times, "share": share})
    return rows


def _check(truth: np.ndarray, predicted: np.ndarray) -> None:
    if truth.shape != predicted.shape:
        raise ValueError(f"{truth.shape} true but {predicted.shape} predicted labels")
    if not len(truth):
        raise ValueError("nothing to measure: no items")


def _ratio(top: np.ndarray | np.generic, bottom: np.ndarray | np.generic) -> Float[np.ndarray, "..."]:
    """`top / bottom`, and 0 where `bottom` is."""
    return np.divide(top, bottom, out=np.zeros(np.shape(bottom)), where=np.not_equal(bottom, 0))
