"""Confidence intervals by the percentile bootstrap (Efron and Tibshirani 1993, chapter 13).

A resample of N items decides only how often each item occurs, and for metrics made of counts only how often each
combination of truth and prediction occurs. Those numbers are multinomial, so they are drawn at once for all resamples:
the same distribution as drawing indices, thousands of times faster.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float, Int

from lexmill.metrics.classification import Average, Counts, f1_each

Interval = tuple[float, float]


def bootstrap(
    statistic: Callable[[Int[np.ndarray, "item"]], float],
    items: int,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The interval of any statistic.

    Args:
        statistic: its value for the items at these indices, some of which occur several times.
        items: how many items there are.
    """
    return percentiles(draws(statistic, items, resamples, seed), confidence)


def draws(
    statistic: Callable[[Int[np.ndarray, "item"]], float], items: int, resamples: int, seed: int
) -> Float[np.ndarray, "resample"]:
    """The statistic of each resample."""
    if items < 1:
        raise ValueError("nothing to resample: no items")
    generator = np.random.default_rng(seed)
    return np.array([statistic(generator.integers(0, items, items)) for _ in range(resamples)])


def percentiles(values: Float[np.ndarray, "resample"], confidence: float) -> Interval:
    """The bounds that leave out the same share of values on both sides."""
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def mean_interval(values: Float[np.ndarray, "item"], *, resamples: int = 1000, confidence: float = 0.95) -> Interval:
    """The interval of the mean of one number an item."""
    return bootstrap(lambda rows: float(values[rows].mean()), len(values), resamples=resamples, confidence=confidence)


def accuracy_interval(
    correct: Bool[np.ndarray, "item"], *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """The interval of the share of items that are right."""
    if not len(correct):
        raise ValueError("nothing to resample: no items")
    hits = np.random.default_rng(seed).binomial(len(correct), correct.mean(), resamples)
    return percentiles(hits / len(correct), confidence)


def f1_interval(
    truth: Int[np.ndarray, "item"],
    predicted: Int[np.ndarray, "item"],
    average: Average,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The interval of F1 where each item has one class."""
    num_classes = int(max(truth.max(initial=0), predicted.max(initial=0))) + 1
    cells, times = np.unique(truth.astype(np.int64) * num_classes + predicted, return_counts=True)
    rows, columns = np.eye(num_classes)[cells // num_classes], np.eye(num_classes)[cells % num_classes]
    values = _f1_draws(rows, columns, times, average, resamples, seed)
    return percentiles(values, confidence)


def multilabel_f1_interval(
    truth: Bool[np.ndarray, "item cls"],
    predicted: Bool[np.ndarray, "item cls"],
    average: Average,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """The interval of F1 where each item has any number of classes."""
    rows, times = np.unique(np.hstack([truth, predicted]), axis=0, return_counts=True)
    true, given = np.split(rows.astype(np.float64), 2, axis=1)
    return percentiles(_f1_draws(true, given, times, average, resamples, seed), confidence)


def _f1_draws(
    truth: Float[np.ndarray, "kind cls"],
    predicted: Float[np.ndarray, "kind cls"],
    times: Int[np.ndarray, "kind"],
    average: Average,
    resamples: int,
    seed: int,
) -> Float[np.ndarray, "resample"]:
    """F1 of each resample, from the kinds of items there are and how many of each."""
    items = int(times.sum())
    if not items:
        raise ValueError("nothing to resample: no items")
    generator = np.random.default_rng(seed)
    values: list[np.ndarray] = []
    # In blocks, so that a large test set does not need resamples x kinds numbers at once.
    block = max(1, 4_000_000 // len(times))
    for start in range(0, resamples, block):
        weights = generator.multinomial(items, times / items, min(block, resamples - start)).astype(np.float64)
        counts = Counts(weights @ (truth * predicted), weights @ truth, weights @ predicted)
        values.append(f1_each(counts, average))
    return np.concatenate(values)
