"""Which keys a query sees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Align = Literal["start", "end"]


@dataclass(frozen=True)
class Rule:
    """Which keys a query sees, by position.

    Args:
        causal: none after its own.
        window: only those fewer than this many positions away.
        align: where a sequence's queries sit when it has fewer of them than keys: at the `end`, so that query `i` is
            at position `k_len - q_len + i`, or at the `start`.
    """

    causal: bool = False
    window: int | None = None
    align: Align = "end"

    def sees_all(self, q_len: int, k_len: int) -> bool:
        """Whether every query sees every key."""
        last_query_only = q_len == 1 and self.align == "end"
        return (not self.causal or last_query_only or k_len == 1) and (self.window is None or k_len <= self.window)

    def visible(self, q_pos: Int[Tensor, "*seq q"], k_pos: Int[Tensor, "k"]) -> Bool[Tensor, "*seq q k"]:
        ahead = k_pos - q_pos.unsqueeze(-1)
        seen = ahead <= 0 if self.causal else torch.ones_like(ahead, dtype=torch.bool)
        return seen if self.window is None else seen & (ahead.abs() < self.window)
