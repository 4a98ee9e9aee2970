"""A matrix in 4 or 8 bits a weight, made whole again for each product (Dettmers et al. 2023, QLoRA)."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lexmill.nn.matmul import linear

Bits = Literal[4, 8]

BLOCK = 64
"""Weights that share a scale."""

_SCALE_BLOCK = 256
"""Scales that share a scale of their own."""

_TAIL = 0.9677083
"""The share of the normal distribution that the outermost level stands at (appendix E)."""


@cache
def nf4_levels() -> Float[Tensor, "16"]:
    """Normal float: 16 levels from -1 to 1, one of them 0, that weights drawn from a normal distribution use about
    equally (appendix E)."""
    up = torch.special.ndtri(torch.linspace(_TAIL, 0.5, 9, dtype=torch.float64))[:-1]
    down = -torch.special.ndtri(torch.linspace(_TAIL, 0.5, 8, dtype=torch.float64))[:-1]
    levels = torch.cat([up, torch.zeros(1, dtype=torch.float64), down]).sort().values
    return (levels / levels.max()).float()


@cache
def _pairs(device: torch.device, dtype: torch.dtype) -> Float[Tensor, "256 2"]:
    """For each byte, the two levels that it holds."""
    levels = nf4_levels()
    byte = torch.arange(256)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], 1).to(device, dtype)


def _quantised(x: Float[Tensor, "block size"], bits: Bits) -> Tensor:
    """Codes of numbers between -1 and 1: bytes of two, or signed bytes."""
    if bits == 8:
        return (x * 127).round().to(torch.int8).flatten()
    levels = nf4_levels().to(x.device)
    codes = torch.bucketize(x.flatten(), (levels[1:] + levels[:-1]) / 2)
    return (codes[::2] << 4 | codes[1::2]).to(torch.uint8)


class Blockwise(nn.Module):
    """A frozen matrix as codes and one scale a block of 64 weights.

    With 4 bits the codes are NF4's, with 8 they are evenly spaced. A product makes the matrix whole, and forgets it;
    so does its backward, which keeps no copy either.

    Args:
        weight: what is to be stored; its precision is that of the matrix when made whole.
        double: whether scales are stored in 8 bits, in blocks of 256, with a scale each and their mean.
    """

    codes: Tensor
    scales: Tensor
    coarse: Tensor | None
    middle: Tensor | None

    def __init__(self, weight: Float[Tensor, "out in"], bits: Bits = 4, *, double: bool = True) -> None:
        super().__init__()
        self.bits: Bits = bits
        self.shape, self.dtype = weight.shape, weight.dtype
        flat = weight.detach().float().flatten()
        blocks = nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
        scales = blocks.abs().amax(1)
        middle = coarse = None
        if double:
            middle = scales.mean()
            rest = nn.functional.pad(scales - middle, (0, -len(scales) % _SCALE_BLOCK)).view(-1, _SCALE_BLOCK)
            coarse = rest.abs().amax(1).clamp(min=1e-12)
            scales = (rest / coarse[:, None] * 127).round().to(torch.int8).flatten()[: len(scales)]
        for name, tensor in (("scales", scales), ("coarse", coarse), ("middle", middle)):
            self.register_buffer(name, tensor)
        # Codes are chosen for the scales as they will be read, so that rounding them costs no more than it must.
        shares = blocks / self._scales()[:, None].clamp(min=1e-12)
        self.register_buffer("codes", _quantised(shares.clamp(-1, 1), bits))

    def _scales(self) -> Float[Tensor, "block"]:
        if self.coarse is None or self.middle is None:
            return self.scales
        return self.scales * self.coarse.repeat_interleave(_SCALE_BLOCK)[: len(self.scales)] / 127 + self.middle

    def whole(self) -> Float[Tensor, "out in"]:
        """The matrix as products see it."""
        if self.bits == 4:
            numbers = _pairs(self.codes.device, torch.float32).index_select(0, self.codes.int())
        else:
            numbers = self.codes.float() / 127
        flat = (numbers.view(-1, BLOCK) * self._scales()[:, None]).flatten()
        return flat[: self.shape.numel()].view(self.shape).to(self.dtype)

    def product(self, x: Float[Tensor, "*rows in"], bias: Float[Tensor, "out"] | None) -> Float[Tensor, "*rows out"]:
        """`x Wᵀ + b`."""
        return _Product.apply(x, bias, self)  # pyright: ignore[reportReturnType]

    def num_bytes(self) -> int:
        """What is stored."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, stored: Blockwise) -> Tensor:
        ctx.stored = stored
        weight = stored.whole()
        return linear(x.to(weight.dtype), weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None]:
        to_x, to_bias, _ = ctx.needs_input_grad
        whole: Tensor = ctx.stored.whole()
        return (
            grad @ whole.to(grad.dtype) if to_x else None,
            grad.flatten(0, -2).sum(0) if to_bias else None,
            None,
        )
