"""An encoder, which is the one transformer, and a decoder that reads what it says (Vaswani et al. 2017), as in T5."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lexmill.errors import UserError
from lexmill.models.backbone import Block, Transformer, norm_of
from lexmill.models.config import LayerShape, ModelConfig
from lexmill.nn.attention import Attention
from lexmill.nn.cache import KVCache, LayerCache
from lexmill.nn.layout import Dense, Layout, Packed
from lexmill.nn.relative import RelativeBias

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Memory:
    """What a decoder reads: the hidden states of its sources, one sequence each.

    Args:
        hidden: `[tok, dim]` with a packed layout, `[seq, len, dim]` with a dense one.
        known: the keys and values of each decoder layer, once they have been computed (`EncoderDecoder.recall`).
    """

    hidden: Float[Tensor, "*rows dim"]
    layout: Layout
    known: tuple[KeysValues, ...] = ()

    def of(self, sources: Int[Tensor, "seq"]) -> Memory:
        """The memory of these sources in this order, which may come up several times; without `known` if packed."""
        if isinstance(self.layout, Dense):
            index = sources.to(self.hidden.device)
            known = tuple((k.index_select(0, index), v.index_select(0, index)) for k, v in self.known)
            return Memory(self.hidden.index_select(0, index), Dense(self.layout.mask[index]), known)
        rows = self.layout.rows_of(sources).to(self.hidden.device)
        return Memory(self.hidden.index_select(0, rows), Packed.of(self.layout.lengths[sources], self.layout.device))


class DecoderBlock(Block):
    """A causal block with attention to the memory between its two halves."""

    def __init__(self, config: ModelConfig, shape: LayerShape) -> None:
        super().__init__(replace(config, causal=True), shape)
        self.cross = Attention(
            config.hidden_size,
            shape.num_heads,
            config.head_dim,
            num_kv_heads=shape.num_kv_heads,
            bias=config.attention_bias,
            output_bias=config.attention_output_bias,
            scaled=config.attention_scaled,
            dropout=config.attention_dropout,
        )
        self.cross_norm = norm_of(config)

    def decode(
        self,
        hidden: Float[Tensor, "*rows dim"],
        layout: Layout,
        memory: Memory,
        asking: Layout,
        *,
        bias: Float[Tensor, "head q_pos k_pos"] | None,
        cache: LayerCache | None,
        known: KeysValues | None,
    ) -> Float[Tensor, "*rows dim"]:
        """The next hidden state; `asking` is how the rows belong to the memory's sequences."""
        x = self._add(hidden, self.attention_norm, lambda y: self.attention(y, layout, bias=bias, cache=cache))
        x = self._add(x, self.cross_norm, lambda y: self.cross(y, asking, memory.hidden, memory.layout, known=known))
        return self._add(x, self.mlp_norm, self.mlp)

    def _add(
        self, x: Float[Tensor, "*rows dim"], normalise: nn.Module, part: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "*rows dim"]:
        """One sub-layer with its residual and norm."""
        if self.post_norm:
            return normalise(self.dropout.onto(x, part(x)))
        return self.dropout.onto(x, part(normalise(x)))


class Decoder(nn.Module):
    """The blocks of a decoder and its final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        shapes = [config.layer(config.num_layers + i) for i in range(config.decoder_layers)]
        self.layers = nn.ModuleList(DecoderBlock(config, shape) for shape in shapes)
        self.norm = norm_of(config) if config.final_norm else nn.Identity()
        self.relative = (
            RelativeBias(config.num_heads, config.relative_buckets, config.relative_max_distance, both_ways=False)
            if config.positions == "relative"
            else None
        )

    @property
    def blocks(self) -> list[DecoderBlock]:
        return [cast("DecoderBlock", block) for block in self.layers]

    def forward(
        self,
        x: Float[Tensor, "*rows dim"],
        layout: Layout,
        memory: Memory,
        asking: Layout,
        cache: KVCache | None = None,
        *,
        recompute: bool = False,
    ) -> Float[Tensor, "*rows dim"]:
        caches: Sequence[LayerCache | None] = [None] * len(self.layers)
        reached = layout
        if cache is not None:
            if not isinstance(layout, Packed):
                raise TypeError("a cache needs a packed layout")
            cache.begin(layout)
            caches, reached = cache.layers, cache.key_layout
        length = reached.max_length if isinstance(reached, Packed) else reached.mask.shape[1]
        bias = None if self.relative is None else self.relative(length)
        known: Sequence[KeysValues | None] = memory.known or [None] * len(self.layers)
        for block, layer_cache, kept in zip(self.blocks, caches, known, strict=True):
            run = partial(checkpoint, block.decode, use_reentrant=False) if recompute else block.decode
            x = run(x, layout, memory, asking, bias=bias, cache=layer_cache, known=kept)
        if cache is not None:
            cache.commit()
        return self.norm(x)


class EncoderDecoder(Transformer):
    """A transformer whose `forward` is the encoder, with a decoder that shares its embeddings."""

    sides: ClassVar[int] = 2

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        if not config.decoder_layers:
            raise UserError("must be at least 1", where="decoder_layers", hint="without a decoder it is another model")
        self.decoder = Decoder(config)

    def decode(
        self,
        ids: Int[Tensor, "*rows"],
        positions: Int[Tensor, "*rows"],
        layout: Layout,
        memory: Memory,
        *,
        asking: Layout | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "*rows dim"]:
        """Hidden states of target tokens that see those before them, and all of their source.

        Args:
            ids: what has been said, begun by the start token.
            memory: of the sources. Sequence `i` of `asking`, which is `layout` unless given, reads source `i`.
            cache: keys and values of earlier target tokens; needs a packed layout.
        """
        if not torch.compiler.is_compiling():
            self.layer_rows += ids.numel() * len(self.layers)  # all of its side, as a source token goes through its own
        x = self.embeddings(ids, positions, None, None)
        again = self.recompute and self.training and torch.is_grad_enabled()
        return self.decoder(x, layout, memory, layout if asking is None else asking, cache, recompute=again)

    def recall(self, memory: Memory) -> Memory:
        """The memory laid side by side, with each decoder layer's keys and values, for many steps of decoding."""
        layout, hidden = memory.layout, memory.hidden
        if not isinstance(layout, Packed):
            return replace(memory, known=tuple(block.cross.keys_values(hidden) for block in self.decoder.blocks))
        padded = layout.padded
        both = (block.cross.keys_values(hidden) for block in self.decoder.blocks)
        known = tuple((k[padded.rows], v[padded.rows]) for k, v in both)
        return Memory(hidden[padded.rows], Dense(padded.mask), known)

    def shifted(self, ids: Int[Tensor, "*rows"], layout: Layout) -> Int[Tensor, "*rows"]:
        """What a decoder has been given when it is to say each of these tokens: the start token, then those before."""
        start = self.config.start_token
        if start is None:
            raise ValueError("the config names no start token")
        moved = ids.roll(1, -1)
        if isinstance(layout, Packed):
            moved[layout.first] = start
        else:
            moved[:, 0] = start
        return moved

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.layers, *self.decoder.layers]

    def new_cache(self, num_sequences: int, capacity: int) -> KVCache:
        """An empty cache for the decoder."""
        like, config = self.embeddings.token.like, self.config
        shapes = [
            (config.layer(config.num_layers + i).num_kv_heads, config.head_dim) for i in range(config.decoder_layers)
        ]
        return KVCache(shapes, num_sequences, capacity, like.dtype, like.device)
