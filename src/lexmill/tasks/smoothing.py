"""What spreading a label's probability over all labels did to losses (Szegedy et al. 2016)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

_ITEMS = 64
"""Of a batch: enough for a mean over a run, and little beside the loss itself where labels are a vocabulary."""


@torch.no_grad()
def smoothing_cost(
    logits: Float[Tensor, "item label"], target: Int[Tensor, "item"], share: float
) -> Float[Tensor, "some"]:
    """By item, of the first few: the cross-entropy with `share` spread over all labels, less that without."""
    logs = logits[:_ITEMS].float().log_softmax(-1)
    return share * (logs.gather(1, target[:_ITEMS].unsqueeze(1)).squeeze(1) - logs.mean(-1))
