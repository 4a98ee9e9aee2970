"""How varied generated texts are."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def distinct(sequences: Sequence[Sequence[Hashable]], n: int) -> float:
    """The share of n-grams, over all sequences together, that are distinct (Li et al. 2016). 0 where there is none."""
    grams = [tuple(seq[i : i + n]) for seq in sequences for i in range(len(seq) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
