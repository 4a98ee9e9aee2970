"""Random numbers that are functions of a key alone, so that nothing drawn depends on how data is cut or counted."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int, UInt64

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(values: UInt64[np.ndarray, "*n"]) -> UInt64[np.ndarray, "*n"]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014): a permutation of 64-bit numbers that looks random."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def keys(indices: Int[np.ndarray, "*n"], *parts: int) -> UInt64[np.ndarray, "*n"]:
    """One key an index, e.g. of an example, for these `parts`, e.g. a seed and an epoch."""
    start = np.zeros(1, np.uint64)
    for part in parts:
        start = mix((start ^ np.array([part], np.uint64)) + _GOLDEN)
    return mix(start + (np.asarray(indices).astype(np.uint64) + np.uint64(1)) * _GOLDEN)


def uniform(of: UInt64[np.ndarray, "*n"], stream: int = 0) -> Float[np.ndarray, "*n"]:
    """One number in [0, 1) a key; other `stream`s of the same key are unrelated."""
    return (keys(of, stream) >> np.uint64(11)) * 2.0**-53
