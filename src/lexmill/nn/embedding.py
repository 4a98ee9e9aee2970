"""Embedding tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lexmill.nn.addition import Addition, register_addition
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

    @property
    def like(self) -> Tensor:
        """A tensor on the device of the table and in the precision of its rows."""
        return self.weight


@register_addition
class Int8Embedding(nn.Module, Addition):
    """Rows of a table of bytes by id, each row with a scale of its own, for inference."""

    addition: ClassVar[str] = "int8_embedding"
    sparse: bool = False
    """Of gradients; it has none."""
    codes: Tensor
    scales: Tensor

    def __init__(self, num: int, dim: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num, dim
        self.register_buffer("codes", torch.zeros(num, dim, dtype=torch.int8))
        self.register_buffer("scales", torch.ones(num))

    @classmethod
    @torch.no_grad()
    def of(cls, table: Embedding) -> Int8Embedding:
        """A table in 8 bits."""
        found = cls(table.num_embeddings, table.embedding_dim)
        rows = table.weight.float()
        found.scales = (rows.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny * 255)
        found.codes = (rows / found.scales[:, None]).round().to(torch.int8)
        return found.train(table.training)

    def forward(self, ids: Int[Tensor, "*rows"]) -> Float[Tensor, "*rows dim"]:
        scales = self.scales[ids].unsqueeze(-1)
        return F.embedding(ids, self.codes).to(scales.dtype) * scales

    @property
    def like(self) -> Tensor:
        """A tensor on the device of the table and in the precision of its rows."""
        return self.scales

    def describe(self) -> dict[str, Any]:
        return {}

    @classmethod
    def build(cls, place: nn.Module | None, described: Mapping[str, Any]) -> Int8Embedding:
        if not isinstance(place, Embedding):
            raise TypeError("there is no table at this place")
        return cls(place.num_embeddings, place.embedding_dim, **described)
