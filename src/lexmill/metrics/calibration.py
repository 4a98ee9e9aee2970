"""Whether probabilities mean what they say."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped


def reliability(
    confidence: Float[np.ndarray, "item"], correct: Bool[np.ndarray, "item"], bins: int = 15
) -> list[dict[str, Any]]:
    """One row a bin of equal width that holds any item: its bounds, its items, their mean confidence and accuracy.

    Bin `m` of `M` holds confidences in ((m-1)/M, m/M], and the first one 0 as well.
    """
    if not len(confidence):
        raise ValueError("nothing to measure: no items")
    if confidence.shape != correct.shape:
        raise ValueError(f"{confidence.shape} confidences but {correct.shape} answers")
    edges = np.linspace(0, 1, bins + 1)
    index = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    items = np.bincount(index, minlength=bins)
    sums = np.bincount(index, weights=confidence, minlength=bins)
    hits = np.bincount(index, weights=correct.astype(np.float64), minlength=bins)
    return [
        {
            "low": float(edges[i]),
            "high": float(edges[i + 1]),
            "count": int(items[i]),
            "confidence": float(sums[i] / items[i]),
            "accuracy": float(hits[i] / items[i]),
        }
        for i in np.flatnonzero(items)
    ]


def expected_calibration_error(
    confidence: Float[np.ndarray, "item"], correct: Bool[np.ndarray, "item"], bins: int = 15
) -> float:
    """The mean distance of confidence and accuracy over bins, weighted by their items (Guo et al. 2017, equation 3)."""
    rows = reliability(confidence, correct, bins)
    return sum(row["count"] * abs(row["confidence"] - row["accuracy"]) for row in rows) / len(confidence)


def brier_score(
    probabilities: Float[np.ndarray, "item cls"], truth: Int[np.ndarray, "item"] | Bool[np.ndarray, "item cls"]
) -> float:
    """The mean squared distance of probabilities from the truth, lower is better.

    Args:
        truth: a class an item: squares are summed over classes (Brier 1950, equation 2), from 0 to 2. Or whether each
            item has each class: the mean is over classes too, from 0 to 1.
    """
    if len(probabilities) != len(truth) or not len(truth):
        raise ValueError(f"{len(probabilities)} items have probabilities and {len(truth)} have labels")
    target: Shaped[np.ndarray, "item cls"] = truth if truth.ndim == 2 else np.eye(probabilities.shape[1])[truth]
    squares = np.square(probabilities - target)
    return float(squares.mean() if truth.ndim == 2 else squares.sum(1).mean())
