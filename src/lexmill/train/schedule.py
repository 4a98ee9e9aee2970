"""Learning rate as a function of the step alone, so that a resumed run needs no state for it."""

from __future__ import annotations

import math
from typing import Literal


def learning_rate(
    step: int, total: int, *, peak: float, schedule: Literal["linear", "cosine", "constant"], warmup: float
) -> float:
    """The learning rate of step `step` (from 0) of `total`.

    Args:
        warmup: share of `total` in which the rate rises linearly; the first step already has a rate above 0.
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
        case "constant":
            return peak
