"""Low-rank adapters beside a matrix that stays as it is (Hu et al. 2022, LoRA)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lexmill.nn.dropout import Dropout
from lexmill.nn.linear import Linear, register
from lexmill.nn.matmul import linear


class LowRank(nn.Module):
    """`x ↦ scale · drop(x) Aᵀ Bᵀ`. B starts at 0, so that a new adapter changes nothing.

    Args:
        rank: columns of B and rows of A.
        scale: alpha / rank in the paper's terms.
        dropout: of the input, in training.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = Dropout(dropout)
        self.a = nn.Parameter(torch.empty(rank, in_features))
        self.b = nn.Parameter(torch.zeros(out_features, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def onto(self, y: Float[Tensor, "*rows out"], x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        """`y` and what the adapter adds to it for the input `x`."""
        inner = linear(self.dropout(x), self.a, None)
        if y.dim() != 2 or y.dtype != inner.dtype:
            return y + self.scale * linear(inner, self.b, None)
        return torch.addmm(y, inner, self.b.t(), alpha=self.scale)

    def delta(self) -> Float[Tensor, "out in"]:
        """What it adds to the matrix."""
        return self.scale * (self.b @ self.a)


RowsOf = Mapping[str, Int[Tensor, "some"]]
"""By name of an adapter, the rows that it is for; no row is in two, and those in none have no adapter."""


class LoraLinear(Linear):
    """A dense layer with low-rank adapters by name, of which one or none is active, or each for some rows."""

    kind: ClassVar[str] = "lora"

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.adapters = nn.ModuleDict()
        self.active: str | RowsOf | None = None
        self.inside: str | None = None
        """The adapter that the matrix holds, added in place."""

    @classmethod
    def around(cls, dense: Linear) -> LoraLinear:
        """A layer that shares the parameters of `dense`."""
        return cls.sharing(dense)

    def add(self, name: str, rank: int, scale: float, dropout: float = 0.0) -> LowRank:
        """Add an adapter, on the device and in the precision of the matrix, and make it the active one."""
        adapter = LowRank(self.in_features, self.out_features, rank, scale, dropout)
        self.adapters[name] = adapter.to(self.like.device, self.like.dtype).train(self.training)
        self.active = name
        return adapter

    def merged(self) -> Linear:
        """A dense layer that computes the same with the active adapter inside its matrix. Its weight is new."""
        return self.with_delta(self.adapter(self.active).delta() if isinstance(self.active, str) else None)

    def merge(self) -> None:
        """Add the active adapter to the matrix in place; the layer is then as fast as a dense one."""
        if not isinstance(self.active, str) or self.inside is not None:
            raise ValueError("there is no active adapter to merge, or one is inside already")
        self.whole()
        with torch.no_grad():
            self.weight += self.adapter(self.active).delta()
        self.inside, self.active = self.active, None

    def unmerge(self) -> None:
        """Take out what `merge` added, and make it the active adapter again.

        The matrix is then what it was to within rounding, since a sum was rounded and a difference is. What is exact is
        `merged`, which leaves this layer alone.
        """
        if self.inside is None:
            raise ValueError("no adapter is inside the matrix")
        with torch.no_grad():
            self.weight -= self.adapter(self.inside).delta()
        self.active, self.inside = self.inside, None

    def forward(self, input: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        y = super().forward(input)
        if self.active is None:
            return y
        if isinstance(self.active, str):
            return self.adapter(self.active).onto(y, input)
        for name, rows in self.active.items():
            if name in self.adapters:
                chosen = self.adapter(name).onto(y.index_select(0, rows), input.index_select(0, rows))
                y = y.index_copy(0, rows, chosen)
        return y

    def adapter(self, name: str) -> LowRank:
        """The adapter of this name."""
        adapter = self.adapters[name]
        assert isinstance(adapter, LowRank)
        return adapter


register(LoraLinear.kind, LoraLinear)
