"""How far the answers of an exported file are from those of its source."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

Evidence = Mapping[str, float]
LEAST_AGREEMENT = 0.95
"""The share of decisions that must be the same, however much numbers may differ."""
CODED = 0.25
"""The largest error that passes where numbers are rounded to codes: of one that falls just between two, rounding
decides, and may decide otherwise in another program. A few texts are then answered noticeably differently, as they are
by torch's own two kernels; most to within rounding."""
MEDIAN_SHARE = 0.25
"""Of what the largest error may be, what the median may be at most: a few answers may differ so far, never most."""


@dataclass(frozen=True)
class Parity:
    """What a file answered to the probes, against its source.

    Args:
        max_error: the largest max|a-b| / max|b| over the evidence of a probe; infinite where names or counts differ. A
            probe whose numbers all happen to be near 0 is measured by the median of max|b|.
        median_error: the same of half of all probes.
        label_agreement: the share of decisions (the largest number of those that stand under one name before the last
            `/`) that are the same; None where the task has no labels.
        probes: how many were compared.
        tolerance: the largest `max_error` that passes.
    """

    max_error: float
    median_error: float
    label_agreement: float | None
    probes: int
    tolerance: float

    @property
    def holds(self) -> bool:
        agrees = self.label_agreement is None or self.label_agreement >= LEAST_AGREEMENT
        near = self.max_error <= self.tolerance and self.median_error <= MEDIAN_SHARE * self.tolerance
        return near and agrees

    def to_dict(self) -> dict[str, float]:
        found = {"max_error": self.max_error, "median_error": self.median_error}
        found |= {"probes": float(self.probes), "tolerance": self.tolerance}
        return found if self.label_agreement is None else {**found, "label_agreement": self.label_agreement}

    def __str__(self) -> str:
        agreed = "" if self.label_agreement is None else f", label agreement {self.label_agreement:.4f}"
        most = f"{self.max_error:.1e} (at most {self.tolerance:.1e})"
        half = f"{self.median_error:.1e} (at most {MEDIAN_SHARE * self.tolerance:.1e})"
        return f"{self.probes} probes, largest relative error {most}, median {half}{agreed}"


def measure(expected: Sequence[Evidence], got: Sequence[Evidence], tolerance: float, *, labelled: bool) -> Parity:
    """Compare evidence probe by probe; `labelled` tells that there are decisions in it."""
    if len(expected) != len(got):
        return Parity(math.inf, math.inf, 0.0 if labelled else None, len(got), tolerance)
    scales = [max(map(abs, one.values()), default=0.0) for one in expected]
    middle = median(scales) if scales else 0.0
    gaps = [_gap(a, b, max(scale, middle)) for a, b, scale in zip(expected, got, scales, strict=True)] or [0.0]
    agreed = [same for a, b in zip(expected, got, strict=True) for same in _decided(a, b)] if labelled else []
    share = sum(agreed) / len(agreed) if agreed else None
    return Parity(max(gaps), median(gaps), share, len(got), tolerance)


def _gap(expected: Evidence, got: Evidence, scale: float) -> float:
    if expected.keys() != got.keys() or not all(map(math.isfinite, got.values())):
        return math.inf
    gap = max((abs(value - got[name]) for name, value in expected.items()), default=0.0)
    return gap / scale if scale else (math.inf if gap else 0.0)


def _decided(expected: Evidence, got: Evidence) -> list[bool]:
    """Of each decision of a probe, whether it is the same."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for name in expected:
        groups[name.rpartition("/")[0]].append(name)
    absent = -math.inf
    return [
        max(names, key=lambda name: expected[name]) == max(names, key=lambda name: got.get(name, absent))
        for names in groups.values()
    ]
