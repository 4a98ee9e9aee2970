"""How well two series of numbers agree."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Num


def pearson(first: Num[np.ndarray, "item"], second: Num[np.ndarray, "item"]) -> float:
    """The linear correlation, from -1 to 1; 0 where one of the two never changes."""
    return float(products(first, second).mean())


def spearman(first: Num[np.ndarray, "item"], second: Num[np.ndarray, "item"]) -> float:
    """The correlation of ranks, ties sharing their mean rank; 0 where one of the two never changes."""
    return pearson(ranks(first), ranks(second))


def products(first: Num[np.ndarray, "item"], second: Num[np.ndarray, "item"]) -> Float[np.ndarray, "item"]:
    """What each item adds to the linear correlation, which is the mean of these."""
    if first.shape != second.shape or not len(first):
        raise ValueError(f"{first.shape} numbers against {second.shape}")
    return _standard(first) * _standard(second)


def ranks(values: Num[np.ndarray, "item"]) -> Float[np.ndarray, "item"]:
    """The rank of each value from 1, smallest first; equal values share the mean of their ranks."""
    _, place, times = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(times)
    return (ends - (times - 1) / 2)[place]


def _standard(values: Num[np.ndarray, "item"]) -> Float[np.ndarray, "item"]:
    centred = values.astype(np.float64) - values.mean(dtype=np.float64)
    spread = np.sqrt(np.square(centred).mean())
    return centred / spread if spread > 0 else np.zeros(len(values))
