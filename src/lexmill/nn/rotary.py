"""Rotary position embedding (Su et al. 2021), with the context extensions of LLaMA."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Rope(NamedTuple):
    """The rotation of each row, for all layers of one forward pass.

    `dim` may be less than that of a head: the first dimensions of each head are turned. `interleaved` says how they
    pair: `2i` with `2i + 1`, or else `i` with `i + dim / 2`.
    """

    cos: Float[Tensor, "*rows dim"]
    sin: Float[Tensor, "*rows dim"]
    interleaved: bool = False

    def of(self, rows: Callable[[Tensor], Tensor]) -> Rope:
        """The rotations of the rows that `rows` chooses."""
        return Rope(rows(self.cos), rows(self.sin), self.interleaved)


@dataclass(frozen=True)
class RopeScaling:
    """How frequencies are stretched for contexts longer than those of pretraining.

    Args:
        kind: `linear` divides every frequency by `factor`; `llama3` (Llama 3.1) divides those of long wavelengths,
            keeps those of short ones and blends between.
        low_freq_factor: `llama3`: wavelengths above `original_max_positions / low_freq_factor` are long.
        high_freq_factor: `llama3`: wavelengths below `original_max_positions / high_freq_factor` are short.
        original_max_positions: `llama3`: the context length of pretraining, in tokens.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


def frequencies(dim: int, theta: float, scaling: RopeScaling | None) -> Float[Tensor, "half"]:
    """Radians a position, of each pair of dimensions. In float32, as the checkpoints were trained."""
    base = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if scaling is None:
        return base
    if scaling.kind == "linear":
        return base / scaling.factor
    turns = scaling.original_max_positions * base / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return (1 - kept) * base / scaling.factor + kept * base


class Rotary:
    """Tables of cosines and sines, built when first needed, per device and precision, and grown by doubling.

    Args:
        dim: how many dimensions of an attention head are turned; must be even.
        theta: the base of the frequencies.
        interleaved: see `Rope`.
    """

    def __init__(
        self, dim: int, theta: float = 10_000.0, scaling: RopeScaling | None = None, *, interleaved: bool = False
    ) -> None:
        self.dim = dim
        self.theta = theta
        self.scaling = scaling
        self.interleaved = interleaved
        self._tables: dict[tuple[torch.device, torch.dtype], Rope] = {}

    def __call__(self, positions: Int[Tensor, "*rows"], length: int, dtype: torch.dtype) -> Rope:
        """The rotation of rows at these positions, all of which are below `length`."""
        if torch.compiler.is_exporting():  # a graph keeps no table that could grow
            return self._turns(positions, dtype)
        key = (positions.device, dtype)
        table = self._tables.get(key)
        if table is None or len(table.cos) < length:
            table = self._tables[key] = self._table(1 << max(length - 1, 63).bit_length(), *key)
        return table.of(lambda rows: rows[positions])

    def _table(self, length: int, device: torch.device, dtype: torch.dtype) -> Rope:
        # Not inference tensors, even when first asked for under inference mode: a later backward pass may use them.
        with torch.inference_mode(False), torch.no_grad():
            found = self._turns(torch.arange(length), dtype)
            return found.of(lambda rows: rows.to(device))

    def _turns(self, positions: Int[Tensor, "*rows"], dtype: torch.dtype) -> Rope:
        """The rotations at these positions."""
        angles = positions.unsqueeze(-1).float() * frequencies(self.dim, self.theta, self.scaling)
        angles = angles.repeat_interleave(2, -1) if self.interleaved else torch.cat([angles, angles], -1)
        return Rope(angles.cos().to(dtype), angles.sin().to(dtype), self.interleaved)


def rotate(x: Float[Tensor, "*rows head dim"], rope: Rope) -> Float[Tensor, "*rows head dim"]:
    """Turn the first dimensions of each head's vector, as many as `rope` has, by its row's rotation."""
    dim = rope.cos.shape[-1]
    turned, still = (x, None) if dim == x.shape[-1] else (x[..., :dim], x[..., dim:])
    if rope.interleaved:
        across = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
    else:
        low, high = turned.chunk(2, -1)
        across = torch.cat([-high, low], -1)
    turned = turned * rope.cos.unsqueeze(-2) + across * rope.sin.unsqueeze(-2)
    return turned if still is None else torch.cat([turned, still], -1)
