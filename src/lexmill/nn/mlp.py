"""The feed-forward half of a block."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from lexmill.nn.activation import ACTIVATIONS, Activation
from lexmill.nn.int8 import Int8Linear, feed_forward
from lexmill.nn.joint import Joint, is_hooked, project
from lexmill.nn.linear import Linear
from lexmill.nn.matmul import activated


class MLP(nn.Module):
    """`down(act(up(x)))`, or gated (Shazeer 2020): `down(act(gate(x)) * up(x))`."""

    def __init__(self, dim: int, width: int, activation: Activation, *, gated: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.activation: Activation = activation
        self.gate = Linear(dim, width, bias=bias, role="column") if gated else None
        self.up = Linear(dim, width, bias=bias, role="column")
        self.down = Linear(width, dim, bias=bias, role="row")

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        if self.gate is None:
            if isinstance(self.up, Int8Linear) and not is_hooked(self.up):
                return feed_forward(self.up, self.activation, self.down, x)
            return self.down(self._activated(self.up, x))
        if isinstance(self.gate, Joint):
            gate, up = project([self.gate, self.up], x)
            return self.down(ACTIVATIONS[self.activation](gate) * up)
        return self.down(self._activated(self.gate, x) * self.up(x))

    def _activated(self, layer: nn.Module, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows width"]:
        if type(layer) is Linear and layer.quantised is None and not is_hooked(layer):
            found = activated(x, layer.weight, layer.bias, self.activation)
            if found is not None:
                return found
        return ACTIVATIONS[self.activation](layer(x))
