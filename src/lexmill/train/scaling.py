"""Loss scaling for fp16, whose smallest numbers gradients fall below (Micikevicius et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass

_START, _LARGEST = 2.0**16, 2.0**24
_PATIENCE = 1000
"""Steps without an overflow after which the scale doubles."""


@dataclass
class LossScale:
    """What a loss is multiplied by before its backward pass, and gradients divided by after it.

    Args:
        value: the scale; 1.0 for good where `fixed`.
        skipped: steps whose gradients overflowed, which changed nothing.
    """

    value: float = _START
    since: int = 0
    skipped: int = 0

    def after(self, *, overflowed: bool) -> None:
        """Halve the scale after an overflow, double it after a long time without one."""
        if overflowed:
            self.value, self.since = self.value / 2, 0
            self.skipped += 1
            return
        self.since += 1
        if self.since == _PATIENCE:
            self.value, self.since = min(self.value * 2, _LARGEST), 0
