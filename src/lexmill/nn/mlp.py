"""The feed-forward half of a block."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lexmill.nn.linear import Linear
from lexmill.nn.matmul import activated

Activation = Literal["gelu", "gelu_tanh", "silu", "relu"]

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "relu": F.relu,
}


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
            return self.down(self._activated(self.up, x))
        return self.down(self._activated(self.gate, x) * self.up(x))

    def _activated(self, layer: nn.Module, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows width"]:
        hooked = layer._forward_hooks or layer._forward_pre_hooks
        if type(layer) is Linear and layer.quantised is None and not hooked:
            found = activated(x, layer.weight, layer.bias, self.activation)
            if found is not None:
                return found
        return ACTIVATIONS[self.activation](layer(x))
