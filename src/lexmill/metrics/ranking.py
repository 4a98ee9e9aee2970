"""How well the right ones are put before the wrong ones, over all items or within each query's own."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int, Num, Shaped

from lexmill.metrics.correlation import ranks

_ROWS = 1024
"""Queries taken at once: what is in memory is this many rows of scores."""


def roc_auc(truth: Bool[np.ndarray, "item"], scores: Num[np.ndarray, "item"]) -> float:
    """How likely a positive item has the higher score than a negative one, ties counting half (the area under the ROC
    curve; Hanley and McNeil 1982). NaN where there are not both."""
    positives = int(truth.sum())
    pairs = positives * (len(truth) - positives)
    if not pairs:
        return float("nan")
    return float((ranks(scores)[truth].sum() - positives * (positives + 1) / 2) / pairs)


def average_precision(truth: Bool[np.ndarray, "item"], scores: Num[np.ndarray, "item"]) -> float:
    """The mean over positive items of the precision among all items of at least its score. NaN without positives."""
    positives = int(truth.sum())
    if not positives:
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    last = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)  # of each run of equal scores
    hits = np.cumsum(truth[order])[last]
    return float((np.diff(hits, prepend=0) * hits / (last + 1)).sum() / positives)


def by_group(groups: Shaped[np.ndarray, "item"]) -> list[Int[np.ndarray, "own"]]:
    """The items of each group, groups in the order in which they first occur."""
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    order = np.argsort(group, kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(group))[:-1])
    return [parts[i] for i in np.argsort(first)]


def reciprocal_rank(truth: Bool[np.ndarray, "item"], scores: Num[np.ndarray, "item"]) -> float:
    """One over the rank of the best positive item; a tie counts against it; 0 without a positive."""
    if not truth.any():
        return 0.0
    return 1 / (1 + int((scores[~truth] >= scores[truth].max()).sum()))


def ndcg(gains: Num[np.ndarray, "item"], scores: Num[np.ndarray, "item"], cut: int = 10) -> float:
    """Normalised discounted cumulative gain of the `cut` items put first (Järvelin and Kekäläinen 2002, with linear
    gains); 0 where no item has a gain. Ties keep the order given."""
    discounts = 1 / np.log2(np.arange(min(cut, len(gains))) + 2)
    best = np.sort(gains)[::-1][:cut] @ discounts
    return float(gains[np.argsort(-scores, kind="stable")][:cut] @ discounts / best) if best > 0 else 0.0


def nearest(
    queries: Float[np.ndarray, "query dim"], candidates: Float[np.ndarray, "candidate dim"], count: int
) -> tuple[Int[np.ndarray, "query count"], Float[np.ndarray, "query count"]]:
    """The `count` candidates of largest inner product with each query, best first, and those products. Exact."""
    count = min(count, len(candidates))
    chosen: list[np.ndarray] = []
    values: list[np.ndarray] = []
    for start in range(0, len(queries), _ROWS):
        scores = queries[start : start + _ROWS] @ candidates.T
        top = np.argpartition(-scores, count - 1, axis=1)[:, :count]
        order = np.argsort(-np.take_along_axis(scores, top, 1), axis=1, kind="stable")
        top = np.take_along_axis(top, order, 1)
        chosen.append(top)
        values.append(np.take_along_axis(scores, top, 1))
    return np.concatenate(chosen), np.concatenate(values)


def own_ranks(
    queries: Float[np.ndarray, "query dim"],
    candidates: Float[np.ndarray, "candidate dim"],
    own: Int[np.ndarray, "query"],
    same: Int[np.ndarray, "query"],
) -> Int[np.ndarray, "query"]:
    """The rank, from 1, of each query's own candidate by inner product; ties count against it.

    Args:
        own: the candidate that each row asks for.
        same: rows of the same number are one query with several right candidates, which do not count against each
            other.
    """
    right = {int(same[rows[0]]): own[rows] for rows in by_group(same)}
    found: list[np.ndarray] = []
    for start in range(0, len(queries), _ROWS):
        part = slice(start, start + _ROWS)
        scores = queries[part] @ candidates.T
        wanted = scores[np.arange(len(scores)), own[part]]
        for row, number in enumerate(same[part].tolist()):
            scores[row, right[number]] = -np.inf
        found.append(1 + (scores >= wanted[:, None]).sum(1))
    return np.concatenate(found)
