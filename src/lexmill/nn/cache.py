"""What is kept of tokens already seen, for decoding one token at a time: keys and values, or a recurrent state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from lexmill.nn.addition import Addition, register_addition
from lexmill.nn.layout import Dense, Layout, Packed

_MOST = 127
_LEAST = 1e-30


class Cache(ABC):
    """What a trunk knows of a fixed set of sequences; `lengths` are the tokens of each so far."""

    lengths: Int[Tensor, "seq"]

    @abstractmethod
    def keep(self, sequences: Int[Tensor, "kept"]) -> None:
        """Go on with these sequences only."""


class Vectors:
    """Vectors of tokens, `[seq, capacity, kv_head, dim]`, as they are."""

    def __init__(self, stored: Shaped[Tensor, "seq capacity kv_head dim"]) -> None:
        self.stored = stored

    @property
    def bytes_per_token(self) -> int:
        return self.stored[0, 0].nbytes

    def put(self, where: tuple[Any, Any], new: Shaped[Tensor, "*rows kv_head dim"]) -> None:
        """Store new vectors at these sequences and places."""
        self.stored[where] = new

    def first(self, width: int) -> Shaped[Tensor, "seq width kv_head dim"]:
        """Those of the first tokens of every sequence."""
        return self.stored[:, :width]

    def keep(self, index: Int[Tensor, "kept"], filled: int) -> None:
        """Go on with these sequences only, of which so many tokens are known."""
        self.stored = _chosen(self.stored, index, filled)

    def grow(self, extra: int) -> None:
        """Make room for so many tokens more."""
        seq, _, *rest = self.stored.shape
        self.stored = torch.cat([self.stored, self.stored.new_zeros(seq, extra, *rest)], 1)


class Int8Vectors(Vectors):
    """Vectors as bytes, each with a scale of its own, that reaches as far as it does; read again in the precision that
    they came in. A scale has 8 bits of mantissa, and numbers are put on what it really is."""

    def __init__(self, like: Float[Tensor, "seq capacity kv_head dim"]) -> None:
        self._dtype = like.dtype
        self._codes = Vectors(torch.zeros_like(like, dtype=torch.int8))
        self._scales = Vectors(torch.zeros_like(like[..., :1], dtype=torch.bfloat16))

    @property
    def bytes_per_token(self) -> int:
        return self._codes.bytes_per_token + self._scales.bytes_per_token

    def put(self, where: tuple[Any, Any], new: Float[Tensor, "*rows kv_head dim"]) -> None:
        wide = new.float()
        scales = (wide.abs().amax(-1, keepdim=True) / _MOST).clamp_min(_LEAST).to(torch.bfloat16)
        self._scales.put(where, scales)
        self._codes.put(where, (wide / scales.float()).round().clamp_(-_MOST, _MOST).to(torch.int8))

    def first(self, width: int) -> Float[Tensor, "seq width kv_head dim"]:
        return self._codes.first(width).to(self._dtype) * self._scales.first(width).to(self._dtype)

    def keep(self, index: Int[Tensor, "kept"], filled: int) -> None:
        self._codes.keep(index, filled)
        self._scales.keep(index, filled)

    def grow(self, extra: int) -> None:
        self._codes.grow(extra)
        self._scales.grow(extra)


@register_addition
class CodedCache(nn.Module, Addition):
    """Says that what a trunk keeps of tokens already seen is bytes; it has no tensors and computes nothing."""

    addition: ClassVar[str] = "kv_int8"

    def describe(self) -> dict[str, Any]:
        return {}

    @classmethod
    def build(cls, place: nn.Module | None, described: Mapping[str, Any]) -> CodedCache:
        return cls()


class LayerCache:
    """One layer's keys and values; its owner says where new tokens go."""

    def __init__(self, owner: KVCache, keys: Vectors, values: Vectors) -> None:
        self.owner, self.keys, self.values = owner, keys, values

    def extend(
        self, keys: Float[Tensor, "tok kv_head dim"], values: Float[Tensor, "tok kv_head dim"]
    ) -> tuple[Float[Tensor, "*rows kv_head dim"], Float[Tensor, "*rows kv_head dim"], Layout]:
        """Store new tokens; returns all keys and values so far and their layout."""
        owner = self.owner
        where = (owner.rows, owner.columns) if owner.column is None else (slice(None), owner.column)
        self.keys.put(where, keys)
        self.values.put(where, values)
        if isinstance(owner.key_layout, Packed):
            return keys, values, owner.key_layout
        width = owner.key_layout.mask.shape[1]
        return self.keys.first(width), self.values.first(width), owner.key_layout


class KVCache(Cache):
    """The caches of all layers, for a fixed set of sequences. Grows by doubling. For inference only.

    A forward pass calls `begin`, each layer `extend`s its own part, then `commit` makes the new tokens old ones.

    Args:
        shapes: (kv_heads, head_dim) of each layer.
        num_sequences: how many sequences decode together.
        capacity: tokens a sequence that fit before the first growth.
        coded: whether keys and values are kept as bytes.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        num_sequences: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        *,
        coded: bool = False,
    ) -> None:
        def empty(kv_heads: int, dim: int) -> Vectors:
            vectors = torch.zeros(num_sequences, capacity, kv_heads, dim, dtype=dtype, device=device)
            return Int8Vectors(vectors) if coded else Vectors(vectors)

        self.capacity = capacity
        self.device = device or torch.device("cpu")
        self.lengths = torch.zeros(num_sequences, dtype=torch.int64)
        self.layers = [LayerCache(self, empty(*shape), empty(*shape)) for shape in shapes]
        self.key_layout: Layout = Packed.of(self.lengths, self.device)
        self.rows: Int[Tensor, "tok"] = torch.zeros(0, dtype=torch.int64)
        self.columns: Int[Tensor, "tok"] = torch.zeros(0, dtype=torch.int64)
        self.column: int | None = None
        """Where the new token of every sequence goes, where each has one and all are as long."""
        self._after = self.lengths

    def begin(self, layout: Packed) -> None:
        """Make room for the next tokens of every sequence."""
        if layout.num_sequences != len(self.lengths):
            raise ValueError(f"the cache holds {len(self.lengths)} sequences, the tokens are of {layout.num_sequences}")
        self._after = self.lengths + layout.lengths
        shortest, longest = (int(length) for length in self._after.aminmax())
        self._reserve(longest)
        one_each = shortest == longest and layout.num_tokens == layout.num_sequences and layout.max_length == 1
        self.column = longest - 1 if one_each else None
        self.rows = layout.sequence
        starts = torch.repeat_interleave(self.lengths - layout.offsets[:-1], layout.lengths)
        self.columns = (starts + torch.arange(layout.num_tokens)).to(self.device)
        if int(self.lengths.max()) == 0:
            self.key_layout = layout
        else:
            mask = torch.arange(longest) < self._after[:, None]
            self.key_layout = Dense(mask.to(self.device), full=shortest == longest)

    @property
    def bytes_per_token(self) -> int:
        """Of the keys and values of all layers."""
        return sum(layer.keys.bytes_per_token + layer.values.bytes_per_token for layer in self.layers)

    @property
    def is_empty(self) -> bool:
        """Whether no sequence has a token in it."""
        return not bool(self.lengths.any())

    def commit(self) -> None:
        """Every layer has stored its tokens."""
        self.lengths = self._after

    def keep(self, sequences: Int[Tensor, "kept"]) -> None:
        """Go on with these sequences only."""
        index, filled = sequences.to(self.device), int(self.lengths.max())
        self.lengths = self.lengths[sequences]
        for layer in self.layers:
            layer.keys.keep(index, filled)
            layer.values.keep(index, filled)

    def _reserve(self, needed: int) -> None:
        if needed <= self.capacity:
            return
        grown = max(needed, 2 * self.capacity)
        for layer in self.layers:
            layer.keys.grow(grown - self.capacity)
            layer.values.grow(grown - self.capacity)
        self.capacity = grown


def _chosen(
    stored: Shaped[Tensor, "seq capacity kv_head dim"], index: Int[Tensor, "kept"], filled: int
) -> Shaped[Tensor, "kept capacity kv_head dim"]:
    """These sequences in the place of the first ones, where there are so many; only what is filled moves."""
    moved = stored[:, :filled].index_select(0, index)
    fits = len(index) <= len(stored)
    out = stored[: len(index)] if fits else stored.new_zeros(len(index), *stored.shape[1:])
    out[:, :filled] = moved
    return out


class RecurrentCache(Cache):
    """The last states of each recurrent layer, `[1, seq, dim]`: one of a GRU, two of an LSTM; none before the first
    token."""

    def __init__(self, num_layers: int, num_sequences: int) -> None:
        self.lengths = torch.zeros(num_sequences, dtype=torch.int64)
        self._states: list[tuple[Tensor, ...] | None] = [None] * num_layers

    def states(self, layer: int, order: Int[Tensor, "seq"]) -> Tensor | tuple[Tensor, ...] | None:
        """A layer's states with the sequences in this order, as torch's layer takes them."""
        kept = self._states[layer]
        if kept is None:
            return None
        ordered = tuple(state.index_select(1, order) for state in kept)
        return ordered[0] if len(ordered) == 1 else ordered

    def store(self, layer: int, order: Int[Tensor, "seq"], after: Tensor | tuple[Tensor, ...]) -> None:
        """Keep a layer's new states, whose sequences are in this order."""
        back = torch.argsort(order)
        states = after if isinstance(after, tuple) else (after,)
        self._states[layer] = tuple(state.index_select(1, back) for state in states)

    def keep(self, sequences: Int[Tensor, "kept"]) -> None:
        self.lengths = self.lengths[sequences]
        self._states = [
            None if kept is None else tuple(state.index_select(1, sequences.to(state.device)) for state in kept)
            for kept in self._states
        ]
