"""What a model needs of its trunk, whatever that is made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lexmill.models.config import LayerOverride
from lexmill.nn.cache import Cache
from lexmill.nn.embedding import Embedding
from lexmill.nn.int8 import Int8Linear
from lexmill.nn.layout import Layout, Packed
from lexmill.nn.linear import Linear
from lexmill.nn.weight_only import WeightOnlyLinear

Only = Literal["all", "first", "last"]


@runtime_checkable
class Structure(Protocol):
    """What the config of every trunk says.

    `hidden_size` is the width of the states that heads are given. A token goes through `num_layers`, of which
    `num_stored_layers` have weights of their own, in groups of `group_size`.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_stored_layers(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def max_positions(self) -> int: ...
    @property
    def causal(self) -> bool: ...
    @property
    def tied_output(self) -> bool: ...
    @property
    def dropout(self) -> float: ...
    @property
    def initializer_range(self) -> float: ...
    @property
    def layers(self) -> tuple[LayerOverride, ...]: ...


class TokenEmbeddings(nn.Module):
    """The table of token embeddings, and what is added to its rows."""

    token: Embedding


class Trunk(nn.Module, ABC):
    """Hidden states of tokens. A new kind is a subclass with a config of its own, which a family's table names."""

    Config: ClassVar[type]
    """A frozen dataclass that is a `Structure`."""
    config: Structure
    embeddings: TokenEmbeddings
    layers: nn.ModuleList
    """The layers in the order they run; `SharedLayers` where several of them are the same module."""
    layer_rows: int = 0
    """Rows computed so far, padding included, summed over the layers that they went through."""
    known_rows: int = 0
    """Rows not computed, since what layers make of them was known; summed over these layers."""
    exited_rows: int = 0
    """Rows not computed, since their text had left at an exit; summed over the layers that it did not go through."""
    exits: nn.Module | None
    """Heads after inner layers that answer a text early, where there are such; see `exits`."""
    sides: ClassVar[int] = 1
    """Through how many sets of layers tokens go, each through its own: two where a decoder reads an encoder."""
    fan_in: bool = False
    """Whether the deviation of new matrices is divided by the square root of their inputs."""
    recomputes: ClassVar[bool] = False
    """Whether it knows `recompute`."""
    recompute: bool = False
    """Whether a backward pass computes the activations inside a layer again, in place of having kept them."""

    @property
    def positions_computed(self) -> float:
        """Rows that have gone through the layers so far; through half of them counts half."""
        return self.layer_rows / len(self.layers)

    @abstractmethod
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
        """Hidden states of all tokens, `[*rows, dim]`, or of one token a sequence, `[seq, dim]`.

        Where the layout knows the hidden states that enter a layer for these `ids`, it begins there.

        Args:
            ids: `[tok]` with a packed layout, `[seq, len]` with a dense one; `positions` and `types` likewise.
            types: segment types; all 0 where None.
            cache: what is known of earlier tokens of the same sequences; needs a packed layout.
            only: with `first` or `last` the last layer computes no more than that token needs.
            collect: is given one dictionary for the embeddings and each layer: `hidden`, and what else a layer tells.
            inputs_embeds: stands in for the token embeddings of `ids`.
            until: stop before this layer, at least 1, and give the hidden states that enter it.
        """

    @property
    def max_tokens(self) -> int:
        """The longest sequence that it takes."""
        return self.config.max_positions

    @property
    def moves_words(self) -> bool:
        """Whether a forward pass takes one row of the token table for each position, which training may then move."""
        return False

    @property
    def has_prompt(self) -> bool:
        """Whether there are rows in front of a sequence, so that `first` gives a row that is not among its tokens'."""
        return False

    @abstractmethod
    def new_cache(self, num_sequences: int, capacity: int) -> Cache:
        """An empty cache for this many sequences; `capacity` is the tokens of each that it should have room for."""

    def straighten(self) -> None:
        """Settle what one text alone goes through in inference mode, where this kind gains by it. To be called again
        when modules were put in others' places."""

    @abstractmethod
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew."""

    @property
    def blocks(self) -> list[nn.Module]:
        """All layers, in the order they run."""
        return list(self.layers)

    def matrices(self, part: nn.Module) -> list[Tensor]:
        """The weights of the embeddings or a layer, `[out, in]`, that each token is multiplied by."""
        coded = (Int8Linear, WeightOnlyLinear)
        linear = (module for module in part.modules() if isinstance(module, (nn.Linear, *coded)))
        return [one.matrix if isinstance(one, (Linear, *coded)) else one.weight for one in linear]

    def matmul_shapes(self) -> list[tuple[int, int]]:
        """(in, out) of every matrix that each token is multiplied by, as often as it is."""
        parts = (self.embeddings, *self.blocks)
        return [(weight.shape[1], weight.shape[0]) for part in parts for weight in self.matrices(part)]


def known_states(
    ids: Int[Tensor, "*rows"], layout: Layout, dtype: torch.dtype
) -> tuple[int, Float[Tensor, "tok dim"]] | None:
    """A layer, and the hidden states that enter it, where the layout knows them for these very `ids`."""
    known = layout.known if isinstance(layout, Packed) else None
    if known is None or not torch.equal(known.ids, ids):
        return None
    return known.layer, known.rows.to(dtype)
