"""Learning rate as a function of the step alone, so that a resumed run needs no state for it."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["linear", "cosine", "exponential", "constant", "wsd"]

_EXPONENTIAL_END = 0.01
"""The share of the peak to which an exponential schedule falls."""


def learning_rate(
    step: int, total: int, *, peak: float, schedule: Schedule, warmup: float, decay: float = 0.2
) -> float:
    """The learning rate of step `step` (from 0) of `total`.

    Args:
        schedule: after the warm-up `linear` or `cosine` to 0, `exponential` to a hundredth, `constant`, or `wsd`:
            stable, then linear to 0 (Hu et al. 2024, MiniCPM).
        warmup: share of `total` in which the rate rises linearly; the first step already has a rate above 0.
        decay: share of the steps after the warm-up in which `wsd` falls.
    """
    rising = round(warmup * total)
    if step < rising:
        return peak * (step + 1) / (rising + 1)
    progress = (step - rising) / max(total - rising, 1)
    match schedule:
        case "linear":
            return peak * (1 - progress)
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * progress))
        case "exponential":
            return peak * _EXPONENTIAL_END**progress
        case "constant":
            return peak
        case "wsd":
            return peak * min(1.0, (1 - progress) / decay)
