"""A linear layer as the product of two thin matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from lexmill.nn.addition import Addition, register_addition
from lexmill.nn.linear import Linear, has_bias, register


@register_addition
class LowRankLinear(nn.Module, Addition):
    """`x ↦ (x Bᵀ) Aᵀ + b`, with B, `down`, `[rank, in]` and A, `up`, `[out, rank]`: `rank · (in + out)` weights in
    place of `in · out`. Both are linear layers of their own, which may be packed and quantised as others."""

    kind: ClassVar[str] = "low_rank"
    addition: ClassVar[str] = "low_rank"

    def __init__(self, in_features: int, out_features: int, rank: int, *, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.down = Linear(in_features, rank, bias=False)
        self.up = Linear(rank, out_features, bias=bias)

    def forward(self, input: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        return self.up(self.down(input))

    def describe(self) -> dict[str, Any]:
        return {"rank": self.down.out_features}

    @classmethod
    def build(cls, place: nn.Module | None, described: Mapping[str, Any]) -> LowRankLinear:
        if not isinstance(place, Linear):
            raise TypeError("there is no linear layer at this place")
        rank = described["rank"]
        return cls(place.in_features, place.out_features, rank, bias=has_bias(place))


register(LowRankLinear.kind, LowRankLinear)
