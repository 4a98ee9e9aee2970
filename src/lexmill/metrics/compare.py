"""Whether one model is better than another on the same items, or only luckier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from jaxtyping import Bool, Int

from lexmill.metrics.intervals import Interval, draws, percentiles


@dataclass(frozen=True)
class Difference:
    """Second model minus first.

    Args:
        value: on the items as they are.
        interval: over resamples of the items.
        p: two-sided; how likely so large a difference is between equally good models.
    """

    value: float
    interval: Interval
    p: float


def paired_bootstrap(
    first: Callable[[Int[np.ndarray, "item"]], float],
    second: Callable[[Int[np.ndarray, "item"]], float],
    items: int,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Difference:
    """The difference of a statistic of two models, both measured on the same resampled items (Koehn 2004).

    Args:
        first: the first model's statistic for the items at these indices.
        second: the second model's.
    """
    values = draws(lambda index: second(index) - first(index), items, resamples, seed)
    everything = np.arange(items)
    value = second(everything) - first(everything)
    # One is added on both sides since the items as they are count as a resample (Davison and Hinkley 1997, 4.2).
    tail = min(int((values <= 0).sum()), int((values >= 0).sum()))
    return Difference(value, percentiles(values, confidence), min(1.0, 2 * (tail + 1) / (resamples + 1)))


def mcnemar(first: Bool[np.ndarray, "item"], second: Bool[np.ndarray, "item"]) -> float:
    """The exact two-sided p of McNemar's test (1947) that two models are right equally often.

    Only items that exactly one model got right say anything; under equality each of them is a fair coin.
    """
    if first.shape != second.shape:
        raise ValueError(f"{first.shape} answers of one model but {second.shape} of the other")
    lost, won = int((first & ~second).sum()), int((second & ~first).sum())
    total, ways, tail = lost + won, 1, 0
    for chosen in range(min(lost, won) + 1):
        tail += ways
        ways = ways * (total - chosen) // (chosen + 1)
    return min(1.0, float(Fraction(2 * tail, 2**total)))
