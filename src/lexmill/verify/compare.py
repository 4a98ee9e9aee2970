"""Comparing the numbers behind answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lexmill.tasks.base import Record

TOLERANCE = 1e-5
"""fp32: the largest max|a-b| / max|b| over the evidence of one probe that is still the same answer."""


@dataclass(frozen=True)
class Difference:
    """The first probe whose answer is another one.

    Args:
        probe: its number, from 0.
        text: what was asked, shortened.
        name: the number that differs most, e.g. `label/refund`.
        expected, got: None where there is no number of that name.
    """

    probe: int
    text: str
    name: str
    expected: float | None
    got: float | None

    def __str__(self) -> str:
        return f"probe {self.probe} {self.text!r}: {self.name} is {self.got!r}, expected {self.expected!r}"


@dataclass(frozen=True)
class Check:
    """One comparison.

    Args:
        name: what was compared, e.g. `trained = served`.
        ok: whether it holds.
        detail: what was found, in words.
        compared: how many things were compared.
        max_error: the largest relative error, where numbers were compared.
        difference: the first difference, where it is one of numbers.
    """

    name: str
    ok: bool
    detail: str
    compared: int = 0
    max_error: float | None = None
    difference: Difference | None = None


Evidence = Mapping[str, float]


def compare(name: str, records: Sequence[Record], expected: Sequence[Evidence], got: Sequence[Evidence]) -> Check:
    """Compare evidence probe by probe. Names must agree as well as numbers, and NaN agrees with nothing."""
    if len(expected) != len(got):
        return Check(name, False, f"{len(got)} answers to {len(expected)} probes", len(got))
    worst = 0.0
    first: Difference | None = None
    for i, (record, want, found) in enumerate(zip(records, expected, got, strict=True)):
        error, blamed = relative_error(want, found)
        worst = max(worst, error)
        if first is None and error > TOLERANCE:
            first = Difference(i, _shown(record), blamed, want.get(blamed), found.get(blamed))
    detail = f"{len(got)} probes, largest relative error {worst:.1e} (at most {TOLERANCE:.0e})"
    return Check(name, first is None, detail if first is None else str(first), len(got), worst, first)


def relative_error(expected: Evidence, got: Evidence) -> tuple[float, str]:
    """max|a-b| / max|b|, and where |a-b| is largest. Infinite where a name is missing or a gap is not finite."""
    unmatched = sorted(expected.keys() ^ got.keys())
    if unmatched:
        return math.inf, unmatched[0]
    if not expected:
        return 0.0, ""
    gaps = {name: abs(value - got[name]) for name, value in expected.items()}
    for name, gap in gaps.items():
        if not math.isfinite(gap):
            return math.inf, name
    blamed = max(gaps, key=gaps.__getitem__)
    if gaps[blamed] == 0:
        return 0.0, blamed
    scale = max(abs(value) for value in expected.values())
    return (gaps[blamed] / scale if scale else math.inf), blamed


def _shown(record: Record) -> str:
    text = " | ".join(value for value in record.values() if isinstance(value, str))
    return text if len(text) <= 60 else text[:59] + "…"
