"""Low-rank adapters in the form of a singular value decomposition (Zhang et al. 2023, AdaLoRA)."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lexmill.nn.dropout import Dropout
from lexmill.nn.linear import Linear, register
from lexmill.nn.matmul import linear

_START = 0.02
"""The standard deviation of new singular vectors."""


class Svd(nn.Module):
    """`x ↦ scale · drop(x) Qᵀ Λ Pᵀ`, with Λ diagonal and 0 at first, so that a new adapter changes nothing.

    A singular value that is set to 0 takes its pair of vectors out; that is how the rank falls.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = Dropout(dropout)
        self.p = nn.Parameter(torch.empty(out_features, rank).normal_(std=_START))
        self.values = nn.Parameter(torch.zeros(rank))
        self.q = nn.Parameter(torch.empty(rank, in_features).normal_(std=_START))

    def onto(self, y: Float[Tensor, "*rows out"], x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """`y` and what the adapter adds to it for the input `x`."""
        inner = linear(self.dropout(x), self.q, None) * (self.scale * self.values)
        return y + linear(inner, self.p, None)

    def delta(self) -> Float[Tensor, "out in"]:
        """What it adds to the matrix."""
        return self.scale * (self.p * self.values) @ self.q

    def rank(self) -> int:
        """Singular values that are not 0."""
        return int(self.values.count_nonzero())

    def penalty(self) -> Float[Tensor, ""]:
        """How far the vectors are from being orthonormal: ‖PᵀP − I‖² + ‖QQᵀ − I‖² (equation 4)."""
        one = torch.eye(len(self.values), dtype=self.p.dtype, device=self.p.device)
        return (self.p.t() @ self.p - one).square().sum() + (self.q @ self.q.t() - one).square().sum()


class SvdLinear(Linear):
    """A dense layer with one such adapter."""

    kind: ClassVar[str] = "adalora"
    adapter: Svd

    @classmethod
    def around(cls, dense: Linear, rank: int, scale: float, dropout: float = 0.0) -> SvdLinear:
        """A layer that shares the parameters of `dense`, with a new adapter on its device and in its precision."""
        layer = cls.sharing(dense)
        adapter = Svd(dense.in_features, dense.out_features, rank, scale, dropout)
        layer.adapter = adapter.to(dense.like.device, dense.like.dtype).train(dense.training)
        return layer

    def merged(self) -> Linear:
        """A dense layer that computes the same with the adapter inside its matrix. Its weight is new."""
        return self.with_delta(self.adapter.delta())

    def forward(self, input: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        return self.adapter.onto(super().forward(input), input)


register(SvdLinear.kind, SvdLinear)
