"""The one transformer, from BERT to LLaMA, by `ModelConfig`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import ClassVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lexmill.errors import UserError
from lexmill.models.config import LayerShape, ModelConfig
from lexmill.models.straight import Straight
from lexmill.models.trunk import Only, TokenEmbeddings, Trunk, known_states
from lexmill.nn.attention import Attention
from lexmill.nn.cache import Cache, KVCache, LayerCache
from lexmill.nn.dropout import Dropout
from lexmill.nn.embedding import Embedding
from lexmill.nn.front import Front, Prompt
from lexmill.nn.layout import Layout, Packed
from lexmill.nn.linear import Linear
from lexmill.nn.mlp import MLP
from lexmill.nn.norm import LayerNorm, RMSNorm, norm
from lexmill.nn.pooling import select
from lexmill.nn.relative import RelativeBias
from lexmill.nn.rotary import Rope, Rotary
from lexmill.nn.shared import SharedLayers


class Embeddings(TokenEmbeddings):
    """Token embeddings, with positions and segment types added where the model has them, projected where they are of
    another width than the layers.

    The token table's gradients are row-sparse (`token.sparse`) until an output head shares it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.embedding_size or config.hidden_size
        self.token = Embedding(config.vocab_size, size, sparse=True, role="vocab")
        rows = config.position_offset + config.max_positions
        self.position = Embedding(rows, size) if config.positions == "learned" else None
        self.position_offset = config.position_offset
        self.segment = Embedding(config.type_vocab_size, size) if config.type_vocab_size else None
        self.task_type = Embedding(config.task_type_vocab_size, size) if config.task_type_vocab_size else None
        self.norm = norm_of(config, size) if config.embedding_norm else nn.Identity()
        self.dropout = Dropout(config.dropout)
        self.projection = Linear(size, config.hidden_size) if config.embedding_size else nn.Identity()
        self.prompt: Prompt | None = None

    def forward(
        self,
        ids: Int[Tensor, "*rows"],
        positions: Int[Tensor, "*rows"],
        types: Int[Tensor, "*rows"] | None,
        inputs_embeds: Float[Tensor, "*rows table_dim"] | None,
    ) -> Float[Tensor, "*rows dim"]:
        x = self.token(ids) if inputs_embeds is None else inputs_embeds
        if self.segment is not None:
            x = x + (self.segment.weight[0] if types is None else self.segment(types))
        if self.position is not None:
            x = x + self.position(positions + self.position_offset if self.position_offset else positions)
        if self.task_type is not None:
            x = x + self.task_type.weight[0]
        return self.projection(self.dropout(self.norm(x)))


class Block(nn.Module):
    """Attention and feed-forward, each with its norms and residual."""

    def __init__(self, config: ModelConfig, shape: LayerShape) -> None:
        super().__init__()
        size = config.hidden_size
        self.post_norm, around = config.norm_place == "post", config.norm_place == "around"
        self.rope_kind = (shape.rope_theta, shape.rope_scaling)
        self.attention = Attention(
            size,
            shape.num_heads,
            config.head_dim,
            num_kv_heads=shape.num_kv_heads,
            bias=config.attention_bias,
            output_bias=config.attention_output_bias,
            qk_norm=(config.norm, config.norm_eps) if config.qk_norm else None,
            scaled=config.attention_scaled,
            causal=config.causal,
            window=shape.window,
            dropout=config.attention_dropout,
        )
        self.attention_norm = norm_of(config) if shape.attention_norm else nn.Identity()
        self.attention_out_norm = norm_of(config) if around else nn.Identity()
        self.mlp = MLP(size, shape.intermediate_size, config.activation, gated=config.gated, bias=config.mlp_bias)
        self.mlp_norm = norm_of(config)
        self.mlp_out_norm = norm_of(config) if around else nn.Identity()
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        hidden: Float[Tensor, "*rows dim"],
        layout: Layout,
        *,
        rope: Rope | None = None,
        bias: Float[Tensor, "head q_pos k_pos"] | None = None,
        only: Only = "all",
        cache: LayerCache | None = None,
        collect: dict[str, Tensor] | None = None,
    ) -> Float[Tensor, "*some_rows dim"]:
        """The next hidden state; with `only`, that of the first or last token of each sequence, `[seq, dim]`."""
        if self.post_norm:
            x, mixed = self._attend(hidden, hidden, layout, rope, bias, only, cache, collect)
            x = self.attention_norm(self.dropout.onto(x, mixed))
            return self.mlp_norm(self.dropout.onto(x, self.mlp(x)))
        x, mixed = self._attend(hidden, self.attention_norm(hidden), layout, rope, bias, only, cache, collect)
        x = self.dropout.onto(x, self.attention_out_norm(mixed))
        return self.dropout.onto(x, self.mlp_out_norm(self.mlp(self.mlp_norm(x))))

    def _attend(
        self,
        hidden: Float[Tensor, "*rows dim"],
        normed: Float[Tensor, "*rows dim"],
        layout: Layout,
        rope: Rope | None,
        bias: Float[Tensor, "head q_pos k_pos"] | None,
        only: Only,
        cache: LayerCache | None,
        collect: dict[str, Tensor] | None,
    ) -> tuple[Float[Tensor, "*some_rows dim"], Float[Tensor, "*some_rows dim"]]:
        """The residual and what attention adds to it, of the rows wanted."""
        if only == "all":
            return hidden, self.attention(normed, layout, rope=rope, bias=bias, cache=cache, collect=collect)
        if only == "first" and self.attention.starts_late:
            mixed = self.attention(normed, layout, rope=rope, bias=bias, cache=cache, collect=collect)
            return select(hidden, layout, only), select(mixed, layout, only)
        asked = select(normed, layout, only)
        turned = None if rope is None else rope.of(lambda rows: select(rows, layout, only))
        packed = isinstance(layout, Packed)
        if not packed:
            asked = asked.unsqueeze(1)
            turned = None if turned is None else turned.of(lambda rows: rows.unsqueeze(1))
        mixed = self.attention(
            asked,
            layout.single,
            normed,
            layout,
            rope=turned,
            memory_rope=rope,
            bias=bias,
            align="start" if only == "first" else "end",
            cache=cache,
            collect=collect,
        )
        return select(hidden, layout, only), mixed if packed else mixed.squeeze(1)


class Transformer(Trunk):
    """Embeddings, blocks, and a final norm where the model has one."""

    Config: ClassVar[type] = ModelConfig
    recomputes: ClassVar[bool] = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config: ModelConfig = config  # pyright: ignore[reportIncompatibleVariableOverride]
        self.exits = None
        self.coded_cache: nn.Module | None = None
        self._straight: Straight | None = None
        self.fan_in = config.initializer_fan_in
        self.embeddings: Embeddings = Embeddings(config)  # pyright: ignore[reportIncompatibleVariableOverride]
        shapes = [config.layer(config.schedule.index(stored)) for stored in range(config.num_stored_layers)]
        blocks = [Block(config, shape) for shape in shapes]
        self.layers = SharedLayers(blocks, config.schedule) if config.num_groups else nn.ModuleList(blocks)
        self.norm = norm_of(config) if config.final_norm else nn.Identity()
        kinds = {(shape.rope_theta, shape.rope_scaling) for shape in shapes if config.positions == "rotary"}
        dim, interleaved = config.rope_dim or config.head_dim, config.rope_interleaved
        self.rotary = {kind: Rotary(dim, *kind, interleaved=interleaved) for kind in kinds}
        self.relative = (
            RelativeBias(config.num_heads, config.relative_buckets, config.relative_max_distance, both_ways=True)
            if config.positions == "relative"
            else None
        )

    def forward(
        self,
        ids: Int[Tensor, "*rows"],
        positions: Int[Tensor, "*rows"],
        layout: Layout,
        *,
        types: Int[Tensor, "*rows"] | None = None,
        cache: Cache | None = None,
        only: Only = "all",
        collect: list[dict[str, Tensor]] | None = None,
        inputs_embeds: Float[Tensor, "*rows table_dim"] | None = None,
        until: int | None = None,
    ) -> Float[Tensor, "*some_rows dim"]:
        """See `Trunk.forward`. With `only`, the last layer computes queries, output and feed-forward for one token a
        sequence; layers tell `collect` of `query`, `key` and `value` too.

        With a prompt in front of the input, `all` gives the rows of the tokens that were given, `first` that of the
        prompt's first embedding, as `peft` has it; a cache keeps the prompt's keys and values, and `collect` is given
        its rows too.
        """
        if cache is not None and not isinstance(cache, KVCache):
            raise TypeError("a transformer needs a cache of keys and values")
        learned = self.embeddings.position is not None
        if learned and cache is None and isinstance(layout, Packed) and layout.max_length > self.max_tokens:
            hint = "shorten texts, with options.max_length"
            raise UserError(f"a text has {layout.max_length} tokens, and room for {self.max_tokens}", hint=hint)
        prompt = self.embeddings.prompt
        if prompt is None or (cache is not None and not cache.is_empty):
            return self._arranged(ids, positions, layout, types, cache, only, collect, inputs_embeds, until)
        front = Front.of(layout, len(prompt))
        embeds = self.embeddings.token(ids) if inputs_embeds is None else inputs_embeds
        zeros = ids.new_zeros(len(prompt))
        hidden = self._arranged(
            front.join(ids, zeros),
            front.join(positions + len(prompt), torch.arange(len(prompt), device=ids.device)),
            front.layout,
            None if types is None else front.join(types, zeros),
            cache,
            only,
            collect,
            front.join(embeds, prompt.weight),
            until,
        )
        return front.leave(hidden) if only == "all" else hidden

    def straighten(self) -> None:
        blocks = [cast("Block", self.layers[index]) for index in range(len(self.layers))]
        plain = blocks and not self.rotary and self.relative is None
        self._straight = Straight.of(blocks, self.layers) if plain else None

    def _arranged(
        self,
        ids: Int[Tensor, "*rows"],
        positions: Int[Tensor, "*rows"],
        layout: Layout,
        types: Int[Tensor, "*rows"] | None,
        cache: KVCache | None,
        only: Only,
        collect: list[dict[str, Tensor]] | None,
        inputs_embeds: Float[Tensor, "*rows dim"] | None,
        until: int | None,
    ) -> Float[Tensor, "*some_rows dim"]:
        whole = cache is None and collect is None and not torch.compiler.is_compiling()
        if not whole or not isinstance(layout, Packed):
            return self._run(ids, positions, layout, types, cache, only, collect, inputs_embeds, until)
        alone = layout.num_sequences == 1 and layout.known is None and until is None
        straight = self._straight if alone and torch.is_inference_mode_enabled() and not self.training else None
        if straight is not None and straight.holds(self.layers):
            self.layer_rows += ids.numel() * len(self.layers)
            return self.norm(straight(self.embeddings(ids, positions, types, inputs_embeds), only))
        if layout.grouped is None:
            return self._run(ids, positions, layout, types, cache, only, collect, inputs_embeds, until)
        # Sequences of equal length become neighbours here, once, so that no layer has to gather them.
        near = layout.grouped
        types = None if types is None else types[near.rows]
        embeds = None if inputs_embeds is None else inputs_embeds.index_select(0, near.rows)
        hidden = self._run(ids[near.rows], positions[near.rows], near.layout, types, None, only, None, embeds, until)
        return hidden.index_select(0, near.restore_rows if only == "all" else near.restore_sequences)

    def _run(
        self,
        ids: Int[Tensor, "*rows"],
        positions: Int[Tensor, "*rows"],
        layout: Layout,
        types: Int[Tensor, "*rows"] | None,
        cache: KVCache | None,
        only: Only,
        collect: list[dict[str, Tensor]] | None,
        inputs_embeds: Float[Tensor, "*rows table_dim"] | None,
        until: int | None,
    ) -> Float[Tensor, "*some_rows dim"]:
        if self.prefix_length:
            positions = positions + self.prefix_length
        count = len(self.layers)
        whole = cache is not None or collect is not None or inputs_embeds is not None
        known = None if whole else known_states(ids, layout, self.embeddings.token.like.dtype)
        start, x = known or (0, self.embeddings(ids, positions, types, inputs_embeds))
        stop = count if until is None else until
        if not torch.compiler.is_compiling():
            self.layer_rows += ids.numel() * (stop - start)
            self.known_rows += ids.numel() * start
        caches: Sequence[LayerCache | None] = [None] * count
        if cache is not None:
            if not isinstance(layout, Packed):
                raise TypeError("a cache needs a packed layout")
            if only == "first":
                raise ValueError("the first token of a sequence is in the cache already; ask for 'all' or 'last'")
            cache.begin(layout)
            caches = cache.layers
        ropes = {kind: turn(positions, self._reach(layout, cache), x.dtype) for kind, turn in self.rotary.items()}
        bias = None if self.relative is None else self.relative(self._reach(layout, cache))
        if collect is not None:
            collect.append({"hidden": x})
        again = self.recompute and self.training and torch.is_grad_enabled()
        for index in range(start, stop):
            seen: dict[str, Tensor] | None = None if collect is None else {}
            last = index == count - 1
            block = cast("Block", self.layers[index])
            run = partial(checkpoint, block, use_reentrant=False) if again else block
            wanted: Only = only if last else "all"
            rope = ropes.get(block.rope_kind)
            x = run(x, layout, rope=rope, bias=bias, only=wanted, cache=caches[index], collect=seen)
            if collect is not None and seen is not None:
                collect.append(seen | {"hidden": x})
        if cache is not None:
            cache.commit()
        if until is not None:
            return x
        if start == count and only != "all":
            x = select(x, layout, only)
        return self.norm(x)

    def _reach(self, layout: Layout, cache: KVCache | None) -> int:
        """More than the largest position."""
        reached = layout if cache is None else cache.key_layout
        longest = reached.max_length if isinstance(reached, Packed) else reached.mask.shape[1]
        return longest + self.prefix_length

    @property
    def prefix_length(self) -> int:
        """Trained keys in front of every sequence; its tokens stand at the positions after them."""
        blocks = (layer for layer in self.layers if isinstance(layer, Block))
        return max([0, *[len(b.attention.prefix) for b in blocks if b.attention.prefix is not None]])

    @property
    def max_tokens(self) -> int:
        prompt = self.embeddings.prompt
        return self.config.max_positions - self.prefix_length - (0 if prompt is None else len(prompt))

    @property
    def has_prompt(self) -> bool:
        return self.embeddings.prompt is not None

    @property
    def moves_words(self) -> bool:
        return self.sides == 1 and not self.has_prompt

    def new_cache(self, num_sequences: int, capacity: int) -> KVCache:
        """An empty cache for this many sequences, in the precision and on the device of the weights."""
        like = self.embeddings.token.like
        shapes = [(self.config.layer(i).num_kv_heads, self.config.head_dim) for i in range(self.config.num_layers)]
        coded = self.coded_cache is not None
        return KVCache(shapes, num_sequences, capacity, like.dtype, like.device, coded=coded)

    def initialise(self, generator: torch.Generator | None = None) -> None:
        initialise(self, self.config.initializer_range, generator, fan_in=self.fan_in)


def norm_of(config: ModelConfig, size: int | None = None) -> LayerNorm | RMSNorm:
    """A norm as the config has it, of hidden states or of this size."""
    return norm(config.norm, size or config.hidden_size, config.norm_eps, bias=config.norm_bias)


def initialise(
    module: nn.Module, std: float, generator: torch.Generator | None = None, *, fan_in: bool = False
) -> None:
    """Draw new weights: tables and matrices from a normal distribution, biases 0, norms 1.

    With `fan_in` the deviation of a matrix is divided by the square root of its inputs, and that of queries by that of
    `head_dim` too where scores are not.
    """
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, (nn.Linear, nn.Embedding)):
                inputs = part.in_features if fan_in and isinstance(part, nn.Linear) else 1
                part.weight.normal_(0.0, std / math.sqrt(inputs), generator=generator)
            elif isinstance(getattr(part, "weight", None), nn.Parameter):
                nn.init.ones_(part.get_parameter("weight"))
            if isinstance(getattr(part, "bias", None), nn.Parameter):
                nn.init.zeros_(part.get_parameter("bias"))
        for part in module.modules():
            if isinstance(part, RelativeBias):
                nn.init.zeros_(part.table.weight)
            elif isinstance(part, Attention) and fan_in and not part.scaled:
                part.query.weight.div_(math.sqrt(part.head_dim))
