"""Whether one model is better than another on the same items, or only luckier."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from jaxtyping import Bool, Float, Int

from lexmill.metrics.intervals import Interval, draws, percentiles

NORMAL = 1.959964
"""The normal distribution's 97.5 % quantile."""


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


def paired_mean(first: Float[np.ndarray, "item"], second: Float[np.ndarray, "item"]) -> Difference:
    """The difference of the mean of a score an item, both models on the same items, with its 95 % interval.

    Resamples hold no case that the items do not hold: where two models never differ, the bootstrap is sure that they
    never will. So for answers that are right or wrong (1 or 0) the interval is Tango's; for other scores it is that of
    the bootstrap, and reaches at least as far as the items that may have been missed would move the mean, if they
    differed as much as any that was seen.
    """
    found = paired_bootstrap(lambda i: float(first[i].mean()), lambda i: float(second[i].mean()), len(first))
    differences = second - first
    if np.isin(differences, (-1, 0, 1)).all():
        won, lost = int((differences > 0).sum()), int((differences < 0).sum())
        return replace(found, interval=tango(won, lost, len(first)))
    missed = float(np.abs(differences).max()) * tango(0, 0, len(first))[1]
    low, high = found.interval
    return replace(found, interval=(min(low, found.value - missed), max(high, found.value + missed)))


def tango(won: int, lost: int, items: int) -> Interval:
    """The 95 % score interval of the difference of two paired proportions (Tango 1998, Statistics in Medicine 17).

    Args:
        won: items that only the second has.
        lost: items that only the first has.
    """

    def above(difference: float) -> float:
        """How many standard errors what was seen is above this difference, under which the rest is likeliest."""
        linear = (2 * items - won + lost) * difference - won - lost
        constant = -lost * difference * (1 - difference)
        lost_share = (math.sqrt(max(linear**2 - 8 * items * constant, 0.0)) - linear) / (4 * items)
        variance = items * (2 * lost_share + difference * (1 - difference))
        seen = won - lost - items * difference
        return seen / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, seen)

    value = (won - lost) / items
    return _crossing(above, -1.0, value, NORMAL), _crossing(above, value, 1.0, -NORMAL)


def _crossing(falling: Callable[[float], float], low: float, high: float, level: float) -> float:
    """Where a falling function reaches a level, by halving."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > level else (low, middle)
    return (low + high) / 2


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
