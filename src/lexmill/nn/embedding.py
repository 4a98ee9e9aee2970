"""Embedding tables."""

from __future__ import annotations

from torch import nn

from lexmill.nn.linear import Role


class Embedding(nn.Embedding):
    """Rows of a table by id.

    Args:
        sparse: whether the gradient is row-sparse: only the rows of this batch, as a `torch.sparse_coo_tensor`.
            It must be off while an output head shares the table, since that head's gradient has every row.
        role: how tensor parallelism may cut it; a label only.
    """

    def __init__(self, num: int, dim: int, *, sparse: bool = False, role: Role = "replicated") -> None:
        super().__init__(num, dim, sparse=sparse)
        self.role: Role = role

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:  # as in `Linear`
            super().reset_parameters()
