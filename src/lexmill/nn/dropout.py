"""Dropout (Srivastava et al. 2014) as a product with a ready mask.

On a CPU torch draws dropout's random numbers one after the other, which costs more than the layer it follows. Here a
mask is made from 8 raw random bits an element, in one sweep. That knows shares in steps of 1/256: each mask takes the
step below `p` or the one above, by chance, so that an element is dropped with probability `p` (255/256 at most); its
scale is exact for the share it took.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

_LEVELS = 1 << 8


def keep_mask(shape: tuple[int, ...], p: float, like: Tensor) -> Float[Tensor, "..."]:
    """0 where dropped, `1 / (1 - p)` where kept; a function of torch's random state on that device alone."""
    if like.device.type != "cpu":
        return torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(1 - p).div_(1 - p)
    count = math.prod(shape)
    seed, chance = torch.randint(1 << 62, (2,), dtype=torch.int64).tolist()
    dropped = min(math.floor(p * _LEVELS + chance / (1 << 62)), _LEVELS - 1)
    words = np.random.SFC64(seed).random_raw((count + 7) // 8)
    levels = torch.from_numpy(words.view(np.int8)[:count])
    mask = torch.empty(count, dtype=like.dtype)
    torch.ge(levels, dropped - _LEVELS // 2, out=mask)
    return mask.mul_(_LEVELS / (_LEVELS - dropped)).view(shape)


def dropout(x: Float[Tensor, "*any"], p: float) -> Float[Tensor, "*any"]:
    """Drop elements, whether or not anything is being trained. At `p` = 0 it is `x` itself."""
    return x * keep_mask(tuple(x.shape), p, x) if p > 0 else x


class Dropout(nn.Module):
    """Drops elements in training, none in evaluation."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        return dropout(x, self.p) if self.training else x

    def onto(self, residual: Float[Tensor, "*rows dim"], x: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
        """`residual + self(x)`, in one sweep."""
        if not self.training or self.p == 0:
            return residual + x
        return torch.addcmul(residual, x, keep_mask(tuple(x.shape), self.p, x))

    def extra_repr(self) -> str:
        return f"p={self.p}"
