"""Linear layers that round as int8 ones do, but compute and learn in floating point."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lexmill.nn.int8 import LEVELS, Grid
from lexmill.nn.linear import Linear
from lexmill.nn.matmul import linear

_MIDDLE = 128
_MOST = 127
_LEAST = torch.finfo(torch.float32).tiny * LEVELS


class FakeInt8Linear(Linear):
    """What `Int8Linear` of the same matrix and grid computes, to within a code where rounding decides, with gradients.
    That of rounding is taken to be 1 within the grid and 0 beyond (Jacob et al. 2018, section 3; Bengio et al. 2013).

    Args:
        grid: where inputs are put; each row on a grid of its own where None.
        divisor: what inputs are divided by first, and columns of the matrix multiplied by; None for nothing.
    """

    kind: ClassVar[str] = "fake_int8"
    grid: Grid | None = None
    divisor: Float[Tensor, "in"] | None = None

    @classmethod
    def over(cls, dense: Linear, grid: Grid | None, divisor: Float[Tensor, "in"] | None = None) -> FakeInt8Linear:
        """A layer that shares the matrix and the bias of a dense one, which thereby learns too."""
        layer = cls.sharing(dense)
        layer.grid, layer.divisor = grid, divisor
        return layer

    def forward(self, input: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows out"]:
        x, weight = input.float(), self.weight.float()
        if self.divisor is not None:
            x, weight = x / self.divisor, weight * self.divisor
        return linear(self._read(x).to(input.dtype), rounded(weight).to(self.weight.dtype), self.bias)

    def _read(self, x: Float[Tensor, "*rows in"]) -> Float[Tensor, "*rows in"]:
        if self.grid is None:
            scale: Any = (x.detach().abs().amax(-1, keepdim=True) / _MOST).clamp_min(_LEAST)
            return _straight_through(x, ((x / scale + _MIDDLE + 0.5).floor() - _MIDDLE) * scale)
        scale, zero = self.grid
        x = x.clamp(-zero * scale, (LEVELS - zero) * scale)
        return _straight_through(x, ((x / scale + zero + 0.5).floor().clamp(0, LEVELS) - zero) * scale)


def rounded(weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """A matrix as its codes stand for it, by row; its gradient is that of the matrix."""
    scale = (weight.detach().abs().amax(1, keepdim=True) / _MOST).clamp_min(_LEAST)
    return _straight_through(weight, (weight / scale).round() * scale)


def _straight_through(x: Tensor, becomes: Tensor) -> Tensor:
    return x + (becomes - x).detach()
