"""From token states to one vector a sequence."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lexmill.nn.layout import Layout, Packed

Pooling = Literal["first", "last", "mean"]


def select(x: Float[Tensor, "*rows dim"], layout: Layout, which: Literal["first", "last"]) -> Float[Tensor, "seq dim"]:
    """The row of each sequence's first or last token."""
    if isinstance(layout, Packed):
        return x.index_select(0, layout.first if which == "first" else layout.last)
    if which == "first":
        return x[:, 0]
    return x[torch.arange(layout.num_sequences, device=x.device), layout.lengths - 1]


def pool(hidden: Float[Tensor, "*rows dim"], layout: Layout, how: Pooling) -> Float[Tensor, "seq dim"]:
    """One vector a sequence: its first token's, its last token's, or the mean over its tokens."""
    if how != "mean":
        return select(hidden, layout, how)
    lengths = layout.lengths.to(hidden.device, hidden.dtype).unsqueeze(-1)
    if isinstance(layout, Packed):
        total = hidden.new_zeros(layout.num_sequences, hidden.shape[-1]).index_add(0, layout.sequence, hidden)
    else:
        total = (hidden * layout.mask.unsqueeze(-1)).sum(1)
    return total / lengths
