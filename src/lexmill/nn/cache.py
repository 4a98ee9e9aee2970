"""What is kept of tokens already seen, for decoding one token at a time: keys and values, or a recurrent state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lexmill.nn.layout import Dense, Layout, Packed


class Cache(ABC):
    """What a trunk knows of a fixed set of sequences; `lengths` are the tokens of each so far."""

    lengths: Int[Tensor, "seq"]

    @abstractmethod
    def keep(self, sequences: Int[Tensor, "kept"]) -> None:
        """Go on with these sequences only."""


class LayerCache:
    """One layer's keys and values, `[seq, capacity, kv_head, dim]`; its owner says where new tokens go."""

    def __init__(self, owner: KVCache, keys: Tensor, values: Tensor) -> None:
        self.owner = owner
        self.keys: Float[Tensor, "seq capacity kv_head dim"] = keys
        self.values: Float[Tensor, "seq capacity kv_head dim"] = values

    def extend(
        self, keys: Float[Tensor, "tok kv_head dim"], values: Float[Tensor, "tok kv_head dim"]
    ) -> tuple[Float[Tensor, "*rows kv_head dim"], Float[Tensor, "*rows kv_head dim"], Layout]:
        """Store new tokens; returns all keys and values so far and their layout."""
        owner = self.owner
        if owner.column is None:
            self.keys[owner.rows, owner.columns] = keys
            self.values[owner.rows, owner.columns] = values
        else:
            self.keys[:, owner.column] = keys
            self.values[:, owner.column] = values
        if isinstance(owner.key_layout, Packed):
            return keys, values, owner.key_layout
        width = owner.key_layout.mask.shape[1]
        return self.keys[:, :width], self.values[:, :width], owner.key_layout


class KVCache(Cache):
    """The caches of all layers, for a fixed set of sequences. Grows by doubling. For inference only.

    A forward pass calls `begin`, each layer `extend`s its own part, then `commit` makes the new tokens old ones.

    Args:
        shapes: (kv_heads, head_dim) of each layer.
        num_sequences: how many sequences decode together.
        capacity: tokens a sequence that fit before the first growth.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        num_sequences: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        def empty(kv_heads: int, dim: int) -> Tensor:
            return torch.zeros(num_sequences, capacity, kv_heads, dim, dtype=dtype, device=device)

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
            layer.keys, layer.values = (_chosen(stored, index, filled) for stored in (layer.keys, layer.values))

    def _reserve(self, needed: int) -> None:
        if needed <= self.capacity:
            return
        grown = max(needed, 2 * self.capacity)
        for layer in self.layers:
            seq, _, heads, dim = layer.keys.shape
            extra = layer.keys.new_zeros(seq, grown - self.capacity, heads, dim)
            layer.keys = torch.cat([layer.keys, extra], 1)
            layer.values = torch.cat([layer.values, extra], 1)
        self.capacity = grown


def _chosen(
    stored: Float[Tensor, "seq capacity kv_head dim"], index: Int[Tensor, "kept"], filled: int
) -> Float[Tensor, "kept capacity kv_head dim"]:
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
