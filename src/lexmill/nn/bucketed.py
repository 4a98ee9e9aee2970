"""Attention of many short sequences in training: a few batched products, and a backward that knows them.

A batch of short texts has some fifteen different lengths. One product for each is more overhead than work, and one
product padded to the longest is mostly padding; so neighbouring lengths share a bucket where that is cheaper. Weights
are kept for the backward, which is why this is for short sequences: they grow with the square of the length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lexmill.nn.dropout import keep_mask
from lexmill.nn.layout import Packed
from lexmill.nn.rule import Rule

MAX_LENGTH = 256
"""The longest sequence that gains from this where nothing is dropped; beyond it torch's fused kernel wins."""

_TILE = 64
"""Queries of a causal bucket that are computed together: what they cannot see is then not computed."""
_BUCKET_COST = 16_384
"""What one bucket more costs, in attention scores computed; measured on two cores, and flat from a third to thrice."""


@dataclass(frozen=True)
class Cells:
    """Where the (token, head) rows of `[tok, head, dim]` stand in `[seq, head, len, dim]`, bucket after bucket.

    Args:
        rows: for each cell, its row; row 0 at padding.
        back: for each row, its cell.
        padding: the cells without a row.
    """

    rows: Int[Tensor, "cell"]
    back: Int[Tensor, "row"]
    padding: Int[Tensor, "pad"]

    def gather(self, x: Float[Tensor, "tok head dim"]) -> Float[Tensor, "cell dim"]:
        return x.reshape(-1, x.shape[-1]).index_select(0, self.rows)

    def scatter(self, x: Float[Tensor, "cell dim"], heads: int) -> Float[Tensor, "tok head dim"]:
        return x.index_select(0, self.back).view(-1, heads, x.shape[-1])


@dataclass(frozen=True)
class Tile:
    """Queries of a bucket, from `first` on and before `last`, and how many keys they see at most, the first ones."""

    first: int
    last: int
    keys: int

    @property
    def queries(self) -> slice:
        return slice(self.first, self.last)


@dataclass(frozen=True)
class Bucket:
    """Sequences that are computed together.

    Args:
        tiles: the queries in parts, where the first ones see fewer keys than the last; all at once otherwise. The last
            queries come first.
        bias: 0 where a query sees a key, minus infinity elsewhere; q is 1 where all queries see the same. None where
            all is seen.
    """

    sequences: int
    q_len: int
    k_len: int
    tiles: tuple[Tile, ...]
    bias: Float[Tensor, "seq 1 k q"] | None


@dataclass(frozen=True)
class Plan:
    """The buckets of a batch, and where its rows stand in them."""

    heads: int
    buckets: tuple[Bucket, ...]
    queries: Cells
    keys: Cells

    def by_query(self, x: Float[Tensor, "cell dim"]) -> Iterator[Float[Tensor, "seq_head q dim"]]:
        """The queries' cells of each bucket."""
        sizes = [bucket.sequences * self.heads * bucket.q_len for bucket in self.buckets]
        return (part.view(-1, b.q_len, x.shape[-1]) for part, b in zip(x.split(sizes), self.buckets, strict=True))

    def by_key(self, x: Float[Tensor, "cell dim"]) -> Iterator[Float[Tensor, "seq_head k dim"]]:
        """The keys' cells of each bucket."""
        sizes = [bucket.sequences * self.heads * bucket.k_len for bucket in self.buckets]
        return (part.view(-1, b.k_len, x.shape[-1]) for part, b in zip(x.split(sizes), self.buckets, strict=True))

    @classmethod
    def of(cls, q_layout: Packed, k_layout: Packed, heads: int, rule: Rule) -> Plan:
        q_lens, k_lens = q_layout.lengths.numpy(), k_layout.lengths.numpy()
        order = np.lexsort((q_lens, k_lens))
        bounds = _cut(q_lens[order], k_lens[order], heads)
        parts = [order[start:end] for start, end in pairwise(bounds)]
        buckets = tuple(_bucket(q_lens[part], k_lens[part], rule) for part in parts)
        keys = _cells(k_layout, parts, heads)
        return cls(heads, buckets, keys if q_layout is k_layout else _cells(q_layout, parts, heads), keys)


def _cut(q_lens: np.ndarray, k_lens: np.ndarray, heads: int) -> list[int]:
    """Where to cut sequences in order of length, so that padding and buckets cost least together."""
    changes = np.flatnonzero(np.diff(q_lens) | np.diff(k_lens)) + 1
    bounds: list[int] = [0, *changes.tolist(), len(q_lens)]
    longest_q = np.maximum.reduceat(q_lens, bounds[:-1]).tolist()
    longest_k = np.maximum.reduceat(k_lens, bounds[:-1]).tolist()
    best, cut_before = [0.0] + [math.inf] * len(longest_q), [0] * len(bounds)
    for end in range(1, len(bounds)):
        q_len = 0
        for start in range(end - 1, -1, -1):
            q_len = max(q_len, longest_q[start])
            scores = heads * (bounds[end] - bounds[start]) * q_len * longest_k[end - 1]
            if scores + _BUCKET_COST > best[end]:
                break
            cost = best[start] + scores + _BUCKET_COST
            if cost < best[end]:
                best[end], cut_before[end] = cost, start
    chosen, end = [len(q_lens)], len(bounds) - 1
    while end:
        end = cut_before[end]
        chosen.append(bounds[end])
    return chosen[::-1]


def _bucket(q_lens: np.ndarray, k_lens: np.ndarray, rule: Rule) -> Bucket:
    q_len, k_len = int(q_lens.max()), int(k_lens.max())
    tiles = (Tile(0, q_len, k_len),)
    held = np.arange(k_len) < k_lens[:, None]
    if rule.sees_all(q_len, k_len):
        seen = held[:, None]
    else:
        starts = k_lens - q_lens if rule.align == "end" else np.zeros_like(k_lens)
        # A query at padding is taken for its sequence's last: with no key in its window it would turn into NaN.
        q_pos = np.minimum(starts[:, None] + np.arange(q_len), k_lens[:, None] - 1)
        seen = held[:, None] & rule.visible(torch.from_numpy(q_pos), torch.arange(k_len)).numpy()
        if rule.causal and q_len >= 2 * _TILE:
            firsts = range(0, q_len, _TILE)
            late = int(starts.max())
            ends = [min(first + _TILE, q_len) for first in firsts]
            tiles = tuple(Tile(a, b, min(late + b, k_len)) for a, b in zip(firsts, ends, strict=True))[::-1]
    if seen.all():
        return Bucket(len(q_lens), q_len, k_len, tiles, None)
    bias = np.where(seen, np.float32(0), np.float32(-np.inf))
    return Bucket(len(q_lens), q_len, k_len, tiles, torch.from_numpy(bias).transpose(1, 2).unsqueeze(1))


def _cells(layout: Packed, parts: list[np.ndarray], heads: int) -> Cells:
    lengths, starts = layout.lengths.numpy(), layout.offsets.numpy()[:-1]
    rows: list[np.ndarray] = []
    real: list[np.ndarray] = []
    for part in parts:
        column = np.arange(lengths[part].max())
        held = column < lengths[part][:, None]
        tokens = np.where(held, starts[part][:, None] + column, 0)
        row = np.where(held[:, None], tokens[:, None] * heads + np.arange(heads)[:, None], 0)
        rows.append(row.ravel())
        real.append(np.broadcast_to(held[:, None], row.shape).ravel())
    all_rows, all_real = np.concatenate(rows), np.concatenate(real)
    back = np.empty(layout.num_tokens * heads, np.int64)
    back[all_rows[all_real]] = np.flatnonzero(all_real)
    return Cells(torch.from_numpy(all_rows), torch.from_numpy(back), torch.from_numpy(np.flatnonzero(~all_real)))


def bucketed_attention(
    q: Float[Tensor, "q_tok head dim"],
    k: Float[Tensor, "k_tok head dim"],
    v: Float[Tensor, "k_tok head dim"],
    plan: Plan,
    dropout: float = 0.0,
    bias: Float[Tensor, "head q_pos k_pos"] | None = None,
) -> Float[Tensor, "q_tok head dim"]:
    """Scaled dot-product attention by `plan`, on a CPU, differentiable once.

    `bias` is added to the scores by position, where every sequence has its queries at the positions of its keys.

    Scores stand as `[seq_head, k, q]`: torch's softmax over the last dimension goes number by number where that is
    shorter than a vector register, while over another it takes neighbouring queries side by side.
    """
    return _Bucketed.apply(q, k, v, bias, plan, dropout)  # pyright: ignore[reportReturnType]


class _Bucketed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, plan: Plan, dropout: float) -> Tensor:
        by_position = None if bias is None else bias.transpose(1, 2).contiguous()
        dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
        # Products in bfloat16 are faster once made, but every new shape of a batch makes oneDNN build one.
        with torch.autocast("cpu", enabled=False):
            q, k, v = (cells.gather(x).to(wide) for cells, x in ((plan.queries, q), (plan.keys, k), (plan.keys, v)))
            out = torch.empty_like(q)
            masks = iter(_keep_masks(plan, dropout, q))
            weights: list[Tensor] = []
            dropped: list[Tensor] = []
            sides = zip(plan.by_query(q), plan.by_key(k), plan.by_key(v), plan.by_query(out), strict=True)
            for bucket, (qs, ks, vs, outs) in zip(plan.buckets, sides, strict=True):
                for tile in bucket.tiles:
                    scores = _scaled(ks[:, : tile.keys], qs[:, tile.queries].transpose(1, 2), dim=qs.shape[-1])
                    by_sequence = scores.view(bucket.sequences, plan.heads, *scores.shape[1:])
                    if bucket.bias is not None:
                        by_sequence.add_(_of(tile, bucket.bias))
                    if by_position is not None:
                        by_sequence.add_(_of(tile, by_position))
                    weights.append(scores.softmax(1))
                    dropped.append(weights[-1] * next(masks) if dropout else weights[-1])
                    _put(outs, tile.queries, dropped[-1].transpose(1, 2), vs[:, : tile.keys])
        ctx.plan = plan
        ctx.like_bias = by_position if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(q, k, v, *weights, *dropped)
        return plan.queries.scatter(out.to(dtype), plan.heads)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        q, k, v, *rest = ctx.saved_tensors
        weights, dropped = iter(rest[: len(rest) // 2]), iter(rest[len(rest) // 2 :])
        asks_k = ctx.needs_input_grad[1]
        # With nothing flowing into a query at padding, nothing flows out of it; keys at padding have weight 0.
        dtype, grad = grad.dtype, plan.queries.gather(grad).to(q.dtype).index_fill_(0, plan.queries.padding, 0)
        to_q, to_k, to_v = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        to_bias = None if ctx.like_bias is None else torch.zeros_like(ctx.like_bias)
        sides = zip(plan.by_query(q), plan.by_key(k), plan.by_key(v), plan.by_query(grad), strict=True)
        results = zip(plan.by_query(to_q), plan.by_key(to_k), plan.by_key(to_v), strict=True)
        for bucket, (qs, ks, vs, grads), (to_qs, to_ks, to_vs) in zip(plan.buckets, sides, results, strict=True):
            covered = bucket.tiles[0].keys == bucket.k_len
            if not covered:  # the last keys are seen by no query
                to_ks.zero_()
                to_vs.zero_()
            for tile in bucket.tiles:
                w, seen, scale = next(weights), next(dropped), 1 / math.sqrt(qs.shape[-1])
                asked, flows, keys = qs[:, tile.queries], grads[:, tile.queries], slice(0, tile.keys)
                whole = covered and tile is bucket.tiles[0]
                _put(to_vs, keys, seen, flows, onto=not whole)
                # What flows into a score is its share of the flow into the weights, less its weight of all shares.
                shares = torch.bmm(vs[:, keys], flows.transpose(1, 2)).mul_(seen)
                to_scores = torch.addcmul(shares, w, shares.sum(1, keepdim=True), value=-1)
                if to_bias is not None:
                    by_sequence = to_scores.view(bucket.sequences, plan.heads, *to_scores.shape[1:])
                    _of(tile, to_bias).add_(by_sequence.sum(0))
                _put(to_qs, tile.queries, to_scores.transpose(1, 2), ks[:, keys], scale=scale)
                if asks_k:
                    _put(to_ks, keys, to_scores, asked, scale=scale, onto=not whole)
        heads = plan.heads
        return (
            plan.queries.scatter(to_q.to(dtype), heads),
            plan.keys.scatter(to_k.to(dtype), heads) if asks_k else None,
            plan.keys.scatter(to_v.to(dtype), heads),
            None if to_bias is None else to_bias.transpose(1, 2),
            None,
            None,
        )


def _scaled(a: Tensor, b: Tensor, *, dim: int) -> Tensor:
    """`a @ b / sqrt(dim)` as one call."""
    return torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=1 / math.sqrt(dim))


def _of(tile: Tile, by_place: Float[Tensor, "*any k q"]) -> Float[Tensor, "*any keys queries"]:
    """What is of a tile in a table of keys by queries."""
    return by_place[..., : tile.keys, tile.queries]


def _put(
    out: Float[Tensor, "seq_head row dim"],
    rows: slice,
    a: Float[Tensor, "seq_head some inner"],
    b: Float[Tensor, "seq_head inner dim"],
    *,
    scale: float = 1.0,
    onto: bool = False,
) -> None:
    """Write `scale · a @ b` to these rows, or add it. Products into parts of rows would be made one by one."""
    if not onto and a.shape[1] == out.shape[1]:
        torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)
        return
    found = torch.baddbmm(a.new_empty(1, 1, 1), a, b, beta=0, alpha=scale)
    if onto:
        out[:, rows].add_(found)
    else:
        out[:, rows].copy_(found)


def _keep_masks(plan: Plan, dropout: float, like: Tensor) -> list[Float[Tensor, "seq_head k q"]]:
    """The masks of all tiles, drawn in one sweep; none where nothing is dropped."""
    if dropout == 0.0:
        return []
    tiles = [(bucket.sequences * plan.heads, tile) for bucket in plan.buckets for tile in bucket.tiles]
    shapes = [(count, tile.keys, tile.last - tile.first) for count, tile in tiles]
    sizes = [math.prod(shape) for shape in shapes]
    drawn = keep_mask((sum(sizes),), dropout, like).split(sizes)
    return [mask.view(shape) for mask, shape in zip(drawn, shapes, strict=True)]
