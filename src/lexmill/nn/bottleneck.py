"""Bottleneck adapters behind a linear layer (Houlsby et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lexmill.nn.activation import ACTIVATIONS, Activation
from lexmill.nn.addition import Addition, register_addition
from lexmill.nn.linear import Linear, register

_START = 1e-2
"""The standard deviation of new matrices: small, so that a new adapter is nearly the identity (section 2.1)."""


class Bottleneck(nn.Module):
    """`y ↦ y + up(act(down(y)))`."""

    def __init__(self, dim: int, width: int, activation: Activation = "gelu") -> None:
        super().__init__()
        self.activation: Activation = activation
        self.down = Linear(dim, width)
        self.up = Linear(width, dim)
        for layer in (self.down, self.up):
            if not layer.weight.is_meta:
                nn.init.trunc_normal_(layer.weight, std=_START, a=-2 * _START, b=2 * _START)
                nn.init.zeros_(layer.bias)

    def forward(self, y: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        return y + self.up(ACTIVATIONS[self.activation](self.down(y)))


@register_addition
class BottleneckLinear(Linear, Addition):
    """A dense layer with a bottleneck behind it. It cannot be merged into the matrix."""

    kind: ClassVar[str] = "bottleneck"
    addition: ClassVar[str] = "bottleneck"
    bottleneck: Bottleneck

    @classmethod
    def around(cls, dense: Linear, width: int, activation: Activation = "gelu") -> BottleneckLinear:
        """A layer that shares the parameters of `dense`, on its device and in its precision."""
        layer = cls.sharing(dense)
        bottleneck = Bottleneck(dense.out_features, width, activation)
        layer.bottleneck = bottleneck.to(dense.like.device, dense.like.dtype).train(dense.training)
        return layer

    def forward(self, input: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        return self.bottleneck(super().forward(input))

    def describe(self) -> dict[str, Any]:
        return {"width": self.bottleneck.down.out_features, "activation": self.bottleneck.activation}

    @classmethod
    def build(cls, place: nn.Module | None, described: Mapping[str, Any]) -> BottleneckLinear:
        if not isinstance(place, Linear):
            raise TypeError("there is no linear layer at this place")
        with torch.device("meta"):
            return cls.around(place, **described)


register(BottleneckLinear.kind, BottleneckLinear)
