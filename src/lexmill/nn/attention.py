"""Attention over packed or dense sequences, and the module around it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lexmill.nn import bucketed
from lexmill.nn.cache import LayerCache
from lexmill.nn.dropout import dropout as drop
from lexmill.nn.front import Prefix
from lexmill.nn.joint import project
from lexmill.nn.layout import Dense, Layout, Packed
from lexmill.nn.linear import Linear
from lexmill.nn.norm import NormKind, norm
from lexmill.nn.rotary import Rope, rotate
from lexmill.nn.rule import Align, Rule

_WIDENED = 64
"""Keys up to which torch's CPU kernel takes longer in bfloat16 than in float32, twice as long at 16."""


def attend(
    q: Float[Tensor, "*q_rows head dim"],
    k: Float[Tensor, "*k_rows kv_head dim"],
    v: Float[Tensor, "*k_rows kv_head dim"],
    q_layout: Layout,
    k_layout: Layout,
    *,
    causal: bool = False,
    window: int | None = None,
    bias: Float[Tensor, "head q_pos k_pos"] | None = None,
    dropout: float = 0.0,
    align: Align = "end",
) -> Float[Tensor, "*q_rows head dim"]:
    """Scaled dot-product attention of each sequence's queries to the same sequence's keys (Vaswani et al. 2017).

    Queries and keys have layouts of their own, for cross-attention, for decoding over a cache, and for a last layer
    that is asked for one token a sequence. Fewer `kv_head` than `head` share keys and values (Ainslie et al. 2023).

    Args:
        q: `[tok, head, dim]` where `q_layout` is packed, `[seq, len, head, dim]` where it is dense; `k`, `v` likewise.
            Packed queries may attend to dense keys; dense queries attend to dense keys only.
        causal, window, align: see `rule.Rule`.
        bias: added to the scores, by position of the query among the keys, and position of the key.
        dropout: share of attention weights set to zero.
    """
    rule = Rule(causal, window, align)
    if isinstance(k_layout, Dense):
        if isinstance(q_layout, Dense):
            return _attend_dense(q, k, v, q_layout, k_layout, rule, bias, dropout)
        if q_layout.num_tokens == q_layout.num_sequences * q_layout.max_length:
            side = q.view(q_layout.num_sequences, q_layout.max_length, *q.shape[1:])
            full = Dense(k_layout.mask.new_ones(side.shape[:2]), full=True)
            return _attend_dense(side, k, v, full, k_layout, rule, bias, dropout).flatten(0, 1)
        k, v = k[k_layout.mask], v[k_layout.mask]
        k_layout = Packed.of(k_layout.lengths.cpu(), k_layout.mask.device)
    if isinstance(q_layout, Dense):
        raise TypeError("dense queries need dense keys")
    if _has_varlen_kernel(q, rule, bias, dropout):
        return _attend_varlen(q, k, v, q_layout, k_layout, rule)
    if q.is_cuda or torch.compiler.is_compiling():  # groups of equal lengths would be others in every batch
        return _attend_padded(q, k, v, q_layout, k_layout, rule, bias, dropout)
    if _gains_by_buckets(q, k, q_layout, k_layout, rule, bias, dropout):
        return _attend_bucketed(q, k, v, q_layout, k_layout, rule, bias, dropout)
    return _attend_grouped(q, k, v, q_layout, k_layout, rule, bias, dropout)


def _gains_by_buckets(
    q: Tensor, k: Tensor, q_layout: Packed, k_layout: Packed, rule: Rule, bias: Tensor | None, dropout: float
) -> bool:
    """Whether gradients are wanted of short sequences, or of causal ones of any length that are dropped from: all other
    ways then compute and keep what no query sees. In bfloat16 that is still the faster way."""
    wanted = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad) and not torch.compiler.is_compiling()
    placed = bias is None or q_layout is k_layout
    short = max(q_layout.max_length, k_layout.max_length) <= bucketed.MAX_LENGTH
    dropping = rule.causal and dropout > 0 and q.dtype != torch.bfloat16
    return wanted and placed and (short or dropping)


def _attend_bucketed(
    q: Tensor, k: Tensor, v: Tensor, q_layout: Packed, k_layout: Packed, rule: Rule, bias: Tensor | None, dropout: float
) -> Tensor:
    if k.shape[1] != q.shape[1]:
        shared = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    plan = q_layout.plan_for(
        k_layout, (q.shape[1], rule), lambda: bucketed.Plan.of(q_layout, k_layout, q.shape[1], rule)
    )
    return bucketed.bucketed_attention(q, k, v, plan, dropout, bias)


def _has_varlen_kernel(q: Tensor, rule: Rule, bias: Tensor | None, dropout: float) -> bool:
    """Whether torch's variable-length kernel does this: CUDA, half precision, heads of at most 256."""
    plain = bias is None and dropout == 0.0 and (rule.align == "end" or not (rule.causal or rule.window))
    half = q.dtype in (torch.bfloat16, torch.float16)
    return plain and half and q.is_cuda and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, q_layout: Packed, k_layout: Packed, rule: Rule) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if k.shape[1] != q.shape[1]:
        shared = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    reach = -1 if rule.window is None else rule.window - 1
    out = varlen_attn(
        q,
        k,
        v,
        q_layout.cu_seqlens,
        k_layout.cu_seqlens,
        q_layout.max_length,
        k_layout.max_length,
        window_size=(reach, 0 if rule.causal else reach),
    )
    assert isinstance(out, Tensor)
    return out


def _attend_padded(
    q: Tensor, k: Tensor, v: Tensor, q_layout: Packed, k_layout: Packed, rule: Rule, bias: Tensor | None, dropout: float
) -> Tensor:
    """Attention alone on padded sequences: one launch, where one a group of equal lengths would cost more."""
    of_q, of_k = q_layout.padded, k_layout.padded
    out = _attend_dense(
        q[of_q.rows], k[of_k.rows], v[of_k.rows], q_layout.side_by_side, k_layout.side_by_side, rule, bias, dropout
    )
    return out.flatten(0, 1).index_select(0, of_q.cells)


def _attend_dense(
    q: Tensor, k: Tensor, v: Tensor, q_layout: Dense, k_layout: Dense, rule: Rule, bias: Tensor | None, dropout: float
) -> Tensor:
    if q_layout.full and k_layout.full:
        mask = _group_mask(q.shape[1], k.shape[1], rule, bias, q)
    elif q_layout.full:
        of = q.shape[1], rule, bias
        mask = k_layout.seen_by(of, lambda: _dense_mask(q_layout, k_layout, rule, bias))
    else:
        mask = _dense_mask(q_layout, k_layout, rule, bias)
    out = _softmax_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, dropout)
    return out.transpose(1, 2)


def _dense_mask(
    q_layout: Dense, k_layout: Dense, rule: Rule, bias: Float[Tensor, "head q_pos k_pos"] | None
) -> Bool[Tensor, "seq 1 q k"] | Float[Tensor, "seq head q k"]:
    q_len, k_len, device = q_layout.mask.shape[1], k_layout.mask.shape[1], k_layout.mask.device
    last = (k_layout.lengths - 1).unsqueeze(-1)
    offset = last + 1 - q_layout.lengths.unsqueeze(-1) if rule.align == "end" else torch.zeros_like(last)
    # A query at padding is taken for one at its sequence's end: with no key in its window it would turn into NaN.
    q_pos = torch.minimum(offset + torch.arange(q_len, device=device), last)
    seen = (k_layout.mask[:, None] & rule.visible(q_pos, torch.arange(k_len, device=device))).unsqueeze(1)
    return seen if bias is None else bias[:, q_pos, :k_len].transpose(0, 1).masked_fill(~seen, -math.inf)


@dataclass(frozen=True)
class _Plan:
    """Sequences of equal lengths side by side: `groups` of (sequences, query length, key length), in order.

    `q_rows` and `k_rows` bring rows into that order and `restore` takes them back; None where they are in it.
    """

    groups: tuple[tuple[int, int, int], ...]
    q_rows: Int[Tensor, "q_tok"] | None
    k_rows: Int[Tensor, "k_tok"] | None
    restore: Int[Tensor, "q_tok"] | None


def _plan(q_layout: Packed, k_layout: Packed) -> _Plan:
    pairs = torch.stack([q_layout.lengths, k_layout.lengths], 1)
    runs, counts = torch.unique_consecutive(pairs, dim=0, return_counts=True)
    if len(runs) == len(pairs.unique(dim=0)):
        q_rows = k_rows = restore = None
    else:
        _, kinds, counts = pairs.unique(dim=0, return_inverse=True, return_counts=True)
        runs = pairs.unique(dim=0)
        order = torch.argsort(kinds, stable=True)
        rows = q_layout.rows_of(order)
        q_rows, restore = rows.to(q_layout.device), torch.argsort(rows).to(q_layout.device)
        k_rows = q_rows if k_layout is q_layout else k_layout.rows_of(order).to(k_layout.device)
    lengths: list[list[int]] = runs.tolist()
    groups = tuple((count, q_len, k_len) for count, (q_len, k_len) in zip(counts.tolist(), lengths, strict=True))
    return _Plan(groups, q_rows, k_rows, restore)


def _attend_grouped(
    q: Tensor, k: Tensor, v: Tensor, q_layout: Packed, k_layout: Packed, rule: Rule, bias: Tensor | None, dropout: float
) -> Tensor:
    """One batched kernel for each group of sequences of equal lengths: no position is computed that holds no token."""
    if q.dtype == torch.bfloat16 and k_layout.max_length <= _WIDENED:
        with torch.autocast("cpu", enabled=False):
            wide = _attend_grouped(q.float(), k.float(), v.float(), q_layout, k_layout, rule, bias, dropout)
        return wide.to(q.dtype)
    plan = q_layout.plan_for(k_layout, "groups", lambda: _plan(q_layout, k_layout))
    if plan.q_rows is not None and plan.k_rows is not None:
        q, k, v = q.index_select(0, plan.q_rows), k.index_select(0, plan.k_rows), v.index_select(0, plan.k_rows)
    q_sizes = [count * q_len for count, q_len, _ in plan.groups]
    k_sizes = [count * k_len for count, _, k_len in plan.groups]
    outs: list[Tensor] = []
    # `split`, not slices: its backward is one concatenation, not one zero-filled tensor a group.
    parts = zip(plan.groups, q.split(q_sizes), k.split(k_sizes), v.split(k_sizes), strict=True)
    for (count, q_len, k_len), q_part, k_part, v_part in parts:
        qs, ks, vs = (part.view(count, -1, *part.shape[1:]).transpose(1, 2) for part in (q_part, k_part, v_part))
        mask = _group_mask(q_len, k_len, rule, bias, q)
        outs.append(_softmax_attention(qs, ks, vs, mask, dropout).transpose(1, 2).flatten(0, 1))
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return out if plan.restore is None else out.index_select(0, plan.restore)


def _group_mask(q_len: int, k_len: int, rule: Rule, bias: Tensor | None, like: Tensor) -> Tensor | None:
    start = k_len - q_len if rule.align == "end" else 0
    chosen = None if bias is None else bias[:, start : start + q_len, :k_len]
    if rule.sees_all(q_len, k_len):
        return chosen
    positions = torch.arange(max(k_len, start + q_len), device=like.device)
    seen = rule.visible(positions[start : start + q_len], positions[:k_len])
    return seen if chosen is None else chosen.masked_fill(~seen, -math.inf)


def _softmax_attention(
    q: Float[Tensor, "seq head q dim"],
    k: Float[Tensor, "seq kv_head k dim"],
    v: Float[Tensor, "seq kv_head k dim"],
    mask: Bool[Tensor, "*any q k"] | Float[Tensor, "*any q k"] | None,
    dropout: float,
) -> Float[Tensor, "seq head q dim"]:
    shared = q.shape[1] // k.shape[1]
    if dropout == 0.0 or q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, enable_gqa=shared > 1)
    # With dropout torch leaves its fused CPU kernel; these few calls are then the faster way.
    if shared > 1:
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    return drop(_weights(q, k, mask), dropout) @ v


def _weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Float[Tensor, "*seq head q k"]:
    scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


def attention_weights(
    q: Float[Tensor, "q_tok head dim"],
    k: Float[Tensor, "k_tok kv_head dim"],
    q_layout: Packed,
    k_layout: Packed,
    *,
    causal: bool = False,
    window: int | None = None,
    bias: Float[Tensor, "head q_pos k_pos"] | None = None,
    align: Align = "end",
) -> list[Float[Tensor, "head q k"]]:
    """The weights that `attend` gives keys before dropout, one tensor a sequence: for looking and for distilling."""
    rule = Rule(causal, window, align)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    q_lengths: list[int] = q_layout.lengths.tolist()
    k_lengths: list[int] = k_layout.lengths.tolist()
    return [
        _weights(qs.transpose(0, 1), ks.transpose(0, 1), _group_mask(len(qs), len(ks), rule, bias, q))
        for qs, ks in zip(q.split(q_lengths), k.split(k_lengths), strict=True)
    ]


class Attention(nn.Module):
    """Multi-head attention with a projection each for queries, keys, values and output.

    Args:
        dim: the width of the states that ask, and of the result.
        memory_dim: the width of the states that are asked; `dim` where None.
        bias: whether queries, keys and values have one; `output_bias` likewise, the same where None.
        qk_norm: the kind and epsilon of a norm over each head's queries and keys (Henry et al. 2020); None for none.
        scaled: whether scores are divided by the square root of `head_dim`.
        causal, window: see `rule.Rule`.
        dropout: share of attention weights set to zero in training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        *,
        num_kv_heads: int | None = None,
        memory_dim: int | None = None,
        bias: bool = True,
        output_bias: bool | None = None,
        qk_norm: tuple[NormKind, float] | None = None,
        scaled: bool = True,
        causal: bool = False,
        window: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        kv_heads = num_kv_heads or num_heads
        self.head_dim = head_dim
        self.scaled = scaled
        self.causal = causal
        self.window = window
        self.dropout = dropout
        self.query = Linear(dim, num_heads * head_dim, bias=bias, role="column")
        self.key = Linear(memory_dim or dim, kv_heads * head_dim, bias=bias, role="column")
        self.value = Linear(memory_dim or dim, kv_heads * head_dim, bias=bias, role="column")
        self.query_norm = norm(qk_norm[0], head_dim, qk_norm[1]) if qk_norm else None
        self.key_norm = norm(qk_norm[0], head_dim, qk_norm[1]) if qk_norm else None
        self.output = Linear(num_heads * head_dim, dim, bias=bias if output_bias is None else output_bias, role="row")
        self.prefix: Prefix | None = None

    def forward(
        self,
        hidden: Float[Tensor, "*q_rows dim"],
        layout: Layout,
        memory: Float[Tensor, "*k_rows memory_dim"] | None = None,
        memory_layout: Layout | None = None,
        *,
        rope: Rope | None = None,
        memory_rope: Rope | None = None,
        bias: Float[Tensor, "head q_pos k_pos"] | None = None,
        align: Align = "end",
        cache: LayerCache | None = None,
        known: tuple[Float[Tensor, "*k_rows kv_head head_dim"], Float[Tensor, "*k_rows kv_head head_dim"]]
        | None = None,
        collect: dict[str, Tensor] | None = None,
    ) -> Float[Tensor, "*q_rows dim"]:
        """Attend from `hidden` to `memory`, or to `hidden` itself.

        Args:
            known: the memory's keys and values, where they were computed before (`keys_values`).
            rope: rotations of the queries, and of the keys unless `memory_rope` is given.
            cache: where the keys and values of earlier tokens are, and these are added.
            collect: is given `query`, `key` and `value` by name, after rotation, `[*rows, head, dim]`.
        """
        source = hidden if memory is None else memory
        k_layout = layout if memory_layout is None else memory_layout
        if memory is None and known is None:
            q, k, v = (self._heads(x) for x in project([self.query, self.key, self.value], hidden))
            k = k if self.key_norm is None else self.key_norm(k)
        else:
            q, (k, v) = self._heads(self.query(hidden)), known or self.keys_values(source)
        if self.query_norm is not None:
            q = self.query_norm(q)
        if not self.scaled:
            q = q * math.sqrt(self.head_dim)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, memory_rope or rope)
        if collect is not None:
            collect |= {"query": q, "key": k, "value": v}
        if cache is not None:
            k, v, k_layout = cache.extend(k, v)
        if self.prefix is not None:
            k, v, k_layout = self._behind_prefix(self.prefix, k, v, k_layout, bias)
        dropout = self.dropout if self.training else 0.0
        out = attend(
            q, k, v, layout, k_layout, causal=self.causal, window=self.window, bias=bias, dropout=dropout, align=align
        )
        return self.output(out.flatten(-2))

    def keys_values(
        self, memory: Float[Tensor, "*rows memory_dim"]
    ) -> tuple[Float[Tensor, "*rows kv_head dim"], Float[Tensor, "*rows kv_head dim"]]:
        """What states are asked by and what they answer, before rotation."""
        k, v = (self._heads(x) for x in project([self.key, self.value], memory))
        return (k if self.key_norm is None else self.key_norm(k)), v

    def _behind_prefix(
        self, prefix: Prefix, k: Tensor, v: Tensor, layout: Layout, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Layout]:
        if bias is not None:
            raise ValueError("a bias by position does not say what it is for a prefix")
        return prefix.join(k, v, layout)

    @property
    def starts_late(self) -> bool:
        """Whether a sequence's first query is not at position 0 among its keys, and sees others for it."""
        return self.prefix is not None and (self.causal or self.window is not None)

    def _heads(self, x: Float[Tensor, "*rows wide"]) -> Float[Tensor, "*rows head dim"]:
        return x.unflatten(-1, (-1, self.head_dim))
