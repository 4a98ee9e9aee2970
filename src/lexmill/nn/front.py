"""Trained rows in front of every sequence: of the keys and values of a layer, or of the input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lexmill.nn.addition import Addition, register_addition
from lexmill.nn.layout import Dense, Layout, Packed


@dataclass(frozen=True)
class Front:
    """Where rows stand when each sequence gets `count` rows in front of it.

    Args:
        layout: of the sequences with those rows.
        order: packed: for each row of `layout`, its place in the old rows followed by the `count` new ones.
        own: packed: for each old row, its place in `layout`.
    """

    count: int
    layout: Layout
    order: Int[Tensor, "rows"] | None
    own: Int[Tensor, "old"] | None

    @classmethod
    def of(cls, layout: Layout, count: int) -> Front:
        """Worked out once for a packed layout, and kept with it."""
        if isinstance(layout, Packed):
            return layout.plan_for(layout, ("front", count), lambda: cls._packed(layout, count))
        ones = layout.mask.new_ones(layout.num_sequences, count)
        return cls(count, Dense(torch.cat([ones, layout.mask], 1)), None, None)

    @classmethod
    def _packed(cls, layout: Packed, count: int) -> Front:
        longer = Packed.of(layout.lengths + count, layout.device)
        rows = torch.arange(layout.num_tokens)
        own = rows + count * (1 + torch.repeat_interleave(torch.arange(layout.num_sequences), layout.lengths))
        new = torch.arange(count)
        order = torch.empty(longer.num_tokens, dtype=torch.int64)
        order[own] = rows
        order[longer.offsets[:-1, None] + new] = layout.num_tokens + new
        return cls(count, longer, order.to(layout.device), own.to(layout.device))

    def join(self, rows: Tensor, new: Tensor) -> Tensor:
        """`rows` with the same `count` new rows in front of each sequence."""
        new = new.to(rows.dtype)
        if self.order is not None:
            return torch.cat([rows, new]).index_select(0, self.order)
        return torch.cat([new.expand(len(rows), *new.shape), rows], 1)

    def leave(self, rows: Tensor) -> Tensor:
        """The old rows out of those with the new ones."""
        return rows[:, self.count :] if self.own is None else rows.index_select(0, self.own)


@register_addition
class Prefix(nn.Module, Addition):
    """Trained keys and values in front of those of a layer (Li and Liang 2021), without a network that makes them.

    They are what attention sees: neither projected nor rotated. New ones are drawn from a normal distribution.
    """

    addition: ClassVar[str] = "prefix"

    def __init__(self, count: int, kv_heads: int, head_dim: int, std: float = 0.02) -> None:
        super().__init__()
        self.key = nn.Parameter(torch.empty(count, kv_heads, head_dim))
        self.value = nn.Parameter(torch.empty(count, kv_heads, head_dim))
        if not self.key.is_meta:
            nn.init.normal_(self.key, std=std)
            nn.init.normal_(self.value, std=std)

    def __len__(self) -> int:
        return len(self.key)

    def join(
        self, k: Float[Tensor, "*rows kv_head dim"], v: Float[Tensor, "*rows kv_head dim"], layout: Layout
    ) -> tuple[Float[Tensor, "*more kv_head dim"], Float[Tensor, "*more kv_head dim"], Layout]:
        """Keys, values and their layout with the prefix in front of each sequence."""
        front = Front.of(layout, len(self))
        return front.join(k, self.key), front.join(v, self.value), front.layout

    def describe(self) -> dict[str, Any]:
        count, kv_heads, head_dim = self.key.shape
        return {"count": count, "kv_heads": kv_heads, "head_dim": head_dim}

    @classmethod
    def build(cls, place: nn.Module | None, described: Mapping[str, Any]) -> Prefix:
        return cls(**described)


@register_addition
class Prompt(nn.Module, Addition):
    """Trained embeddings in front of the input (Lester et al. 2021)."""

    addition: ClassVar[str] = "prompt"

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, dim))

    def __len__(self) -> int:
        return len(self.weight)

    def describe(self) -> dict[str, Any]:
        return {"count": len(self), "dim": self.weight.shape[1]}

    @classmethod
    def build(cls, place: nn.Module | None, described: Mapping[str, Any]) -> Prompt:
        return cls(**described)
