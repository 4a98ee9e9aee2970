"""Cutting an optimiser batch into micro-batches."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int


def micro_batches(
    indices: Int[np.ndarray, "example"], lengths: Int[np.ndarray, "all"], token_budget: int
) -> list[Int[np.ndarray, "part"]]:
    """Cut the examples of one optimiser batch into parts of at most `token_budget` tokens.

    Parts run from short texts to long ones, so that the lengths within a part are nearly equal. A text longer than the
    budget is a part of its own. The loss does not depend on the cut.

    Args:
        indices: the examples of the batch.
        lengths: tokens of every example of the data set, indexed by `indices`.
        token_budget: at least 1.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget {token_budget} is less than 1")
    ordered = indices[np.argsort(lengths[indices], kind="stable")]
    ends = np.cumsum(lengths[ordered], dtype=np.int64)
    parts: list[np.ndarray] = []
    start = used = 0
    while start < len(ordered):
        stop = max(int(np.searchsorted(ends, used + token_budget, side="right")), start + 1)
        parts.append(ordered[start:stop])
        used = int(ends[stop - 1])
        start = stop
    return parts
