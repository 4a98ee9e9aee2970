"""Normalisation over the last dimension."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

NormKind = Literal["layer", "rms"]


class LayerNorm(nn.Module):
    """Ba et al. 2016: zero mean and unit variance, then a learned scale and, with `bias`, a shift."""

    def __init__(self, dim: int, eps: float = 1e-5, *, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019: unit root mean square, then a learned scale.

    Half precisions are squared and averaged in float32; the scale is applied in the precision of the input, which is
    what checkpoints of LLaMA were trained with.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)


def norm(kind: NormKind, dim: int, eps: float, *, bias: bool = True) -> LayerNorm | RMSNorm:
    """A normalisation by its kind; `bias` is of layer norms alone."""
    return LayerNorm(dim, eps, bias=bias) if kind == "layer" else RMSNorm(dim, eps)
