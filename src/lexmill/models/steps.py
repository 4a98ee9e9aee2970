"""One more token of each sequence, straight through a decoder.

A step of decoding is bound by reading the matrices and by what is done around the products: looking up modules,
ordering rows, asking what may be. Here all of that is settled once for an answer, so that what is left are the calls
into torch. The numbers are those of `Transformer.forward` over a cache, to within rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from lexmill.models.backbone import Block, Transformer
from lexmill.models.trunk import Trunk
from lexmill.nn.activation import ACTIVATIONS
from lexmill.nn.attention import Attention
from lexmill.nn.cache import KVCache, LayerCache
from lexmill.nn.int8 import Int8Linear
from lexmill.nn.joint import is_hooked, joined
from lexmill.nn.layout import Dense, Packed
from lexmill.nn.linear import Linear
from lexmill.nn.low_rank import LowRankLinear
from lexmill.nn.mlp import MLP
from lexmill.nn.norm import RMSNorm
from lexmill.nn.weight_only import WeightOnlyLinear

Step = Callable[[Tensor], Tensor]
Turn = tuple[Tensor, Tensor] | None
"""Cosines, and sines as `_turned` wants them, of each sequence's position; None where positions are not turned."""
Layer = Callable[[Tensor, Turn, LayerCache, Tensor | None], Tensor]

_KINDS = (Linear, Int8Linear, LowRankLinear, WeightOnlyLinear)


@dataclass(frozen=True)
class Steps:
    """The layers of a decoder for one token a sequence. They are bound to its modules as they are when it is made."""

    trunk: Transformer
    layers: Sequence[tuple[Layer, Hashable]]
    """Each with the kind of its rotation."""

    @classmethod
    def of(cls, trunk: Trunk) -> Steps | None:
        """None where the trunk does what is not known here: any norms but those before its parts, windows, prefixes,
        prompts, biases by position, layers that someone listens to."""
        if not isinstance(trunk, Transformer) or trunk.embeddings.prompt is not None or trunk.relative is not None:
            return None
        if trunk.training or any(turn.interleaved for turn in trunk.rotary.values()) or is_hooked(trunk):
            return None
        blocks = [block for block in trunk.blocks if isinstance(block, Block) and _is_plain(block, trunk)]
        if len(blocks) < len(trunk.layers):
            return None
        return cls(trunk, [(_layer(block), block.rope_kind) for block in blocks])

    def __call__(self, ids: Int[Tensor, "seq"], cache: KVCache) -> Float[Tensor, "seq dim"]:
        """The last hidden state of the next token of each sequence; the cache, which must know earlier ones, then
        knows these too."""
        positions = cache.lengths.to(ids.device)
        cache.begin(Packed(torch.arange(len(ids) + 1), ids.device))
        keys = cache.key_layout
        assert isinstance(keys, Dense)
        mask: Bool[Tensor, "seq 1 1 key"] | None = None if keys.full else keys.mask[:, None, None]
        x = self.trunk.embeddings(ids, positions, None, None)
        turns = self._turns(positions, keys.mask.shape[1], x.dtype)
        for (layer, kind), known in zip(self.layers, cache.layers, strict=True):
            x = layer(x, turns.get(kind), known, mask)
        cache.commit()
        self.trunk.layer_rows += len(ids) * len(self.layers)
        return self.trunk.norm(x)

    def _turns(self, positions: Tensor, reach: int, dtype: torch.dtype) -> Mapping[Hashable, Turn]:
        found: dict[Hashable, Turn] = {}
        for kind, rotary in self.trunk.rotary.items():
            rope = rotary(positions, reach, dtype)
            low, high = rope.sin.chunk(2, -1)
            found[kind] = rope.cos.unsqueeze(1), torch.cat([-low, high], -1).unsqueeze(1)
        return found


def _is_plain(block: Block, trunk: Transformer) -> bool:
    attention, mlp = block.attention, block.mlp
    linears = (attention.query, attention.key, attention.value, attention.output, mlp.up, mlp.down)
    return (
        not block.post_norm
        and type(attention) is Attention
        and type(mlp) is MLP
        and attention.window is None
        and attention.prefix is None
        and attention.scaled
        and type(block.attention_out_norm) is nn.Identity
        and type(block.mlp_out_norm) is nn.Identity
        and all(turn.dim == attention.head_dim for turn in trunk.rotary.values())
        and all(type(one) in _KINDS for one in (*linears, *([] if mlp.gate is None else [mlp.gate])))
        and not any(is_hooked(one) for one in block.modules())
    )


def _layer(block: Block) -> Layer:
    attention, dim = block.attention, block.attention.head_dim
    wide, narrow = attention.query.out_features // dim, attention.key.out_features // dim
    heads, output, feed = _heads(attention, wide, narrow), _step([attention.output]), _feed_forward(block.mlp)
    before_attention, before_mlp, shared = _norm(block.attention_norm), _norm(block.mlp_norm), wide > narrow

    def run(x: Tensor, turn: Turn, known: LayerCache, mask: Tensor | None) -> Tensor:
        q, k, v = heads(before_attention(x), turn)
        keys, values, _ = known.extend(k, v)
        mixed = F.scaled_dot_product_attention(
            q.unsqueeze(2), keys.transpose(1, 2), values.transpose(1, 2), mask, enable_gqa=shared
        )
        x = x + output(mixed.view(len(x), wide * dim))
        return x + feed(before_mlp(x))

    return run


def _heads(attention: Attention, wide: int, narrow: int) -> Callable[[Tensor, Turn], tuple[Tensor, Tensor, Tensor]]:
    layers, dim = [attention.query, attention.key, attention.value], attention.head_dim
    query_norm, key_norm = attention.query_norm, attention.key_norm
    if joined(layers) is not None and query_norm is None and key_norm is None:
        together = _step(layers)

        def at_once(x: Tensor, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
            qk, v = together(x).view(len(x), -1, dim).split([wide + narrow, narrow], 1)
            q, k = _turned(qk, turn).split([wide, narrow], 1)
            return q, k, v

        return at_once
    query, key, value = (_step([one]) for one in layers)

    def each(x: Tensor, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (step(x).view(len(x), -1, dim) for step in (query, key, value))
        q, k = q if query_norm is None else query_norm(q), k if key_norm is None else key_norm(k)
        return _turned(q, turn), _turned(k, turn), v

    return each


def _turned(heads: Float[Tensor, "seq head dim"], turn: Turn) -> Float[Tensor, "seq head dim"]:
    if turn is None:
        return heads
    cos, sin = turn
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, -1), sin)


def _feed_forward(mlp: MLP) -> Step:
    gate, act, down = mlp.gate, ACTIVATIONS[mlp.activation], _step([mlp.down])
    if gate is None or joined([gate, mlp.up]) is None:
        return mlp.forward
    both, width = _step([gate, mlp.up]), mlp.up.out_features

    def run(x: Tensor) -> Tensor:
        opened, given = both(x).split(width, -1)
        return down(act(opened) * given)

    return run


def _step(layers: Sequence[nn.Module]) -> Step:
    """The product of the same rows with the matrices of these, which join the first."""
    first = layers[0]
    if isinstance(first, WeightOnlyLinear):
        return first.product([one for one in layers if isinstance(one, WeightOnlyLinear)]).multiply
    if isinstance(first, Int8Linear):
        product = first.product([one for one in layers if isinstance(one, Int8Linear)])
        return lambda x: product.multiply(product.read(x))
    return first.forward


def _norm(layer: nn.Module) -> Step:
    if not isinstance(layer, RMSNorm) or layer.weight.dtype != torch.float32:
        return layer.forward
    weight, shape, eps = layer.weight, list(layer.weight.shape), layer.eps
    return lambda x: torch.rms_norm(x, shape, weight, eps)
