"""What attention adds to a score for the distance between query and key (Raffel et al. 2020)."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lexmill.nn.embedding import Embedding


def distance_buckets(
    ahead: Int[Tensor, "*any"], buckets: int, max_distance: int, *, both_ways: bool
) -> Int[Tensor, "*any"]:
    """The bucket of keys this many positions after their query; negative ones stand before it.

    The nearer half of the buckets hold one distance each, the others ever longer spans, and the last all that is
    `max_distance` or farther. With `both_ways` keys after the query have one half of the buckets, keys before it the
    other; otherwise all keys after it count as distance 0.
    """
    if both_ways:
        buckets //= 2
        distance, first = ahead.abs(), torch.where(ahead > 0, buckets, 0)
    else:
        distance, first = (-ahead).clamp(min=0), torch.zeros_like(ahead)
    exact = buckets // 2
    # In float32 and in this order: checkpoints know distances at a boundary by how this is rounded.
    share = torch.log(distance.clamp(min=exact).float() / exact) / math.log(max_distance / exact)
    far = (exact + (share * (buckets - exact)).long()).clamp(max=buckets - 1)
    return first + torch.where(distance < exact, distance, far)


class RelativeBias(nn.Module):
    """A learned number for each head and bucket of distances.

    Args:
        max_distance: distances from here on share a bucket.
        both_ways: whether keys after the query are told from keys before it.
    """

    def __init__(self, num_heads: int, buckets: int, max_distance: int, *, both_ways: bool) -> None:
        super().__init__()
        self.table = Embedding(buckets, num_heads)
        self.max_distance = max_distance
        self.both_ways = both_ways

    def forward(self, length: int) -> Float[Tensor, "head q_pos k_pos"]:
        """The bias of every query position and key position below `length`."""
        ahead = torch.arange(1 - length, length, device=self.table.weight.device)
        found = distance_buckets(ahead, self.table.num_embeddings, self.max_distance, both_ways=self.both_ways)
        by_distance = self.table.weight[found].t()
        # Row `i` of the windows starts at distance `i + 1 - length`, which is that of the first key from query
        # `length - 1 - i`.
        return by_distance.unfold(1, length, 1).flip(1)
