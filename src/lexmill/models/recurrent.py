"""The one recurrent trunk: layers of LSTM or GRU, one way or both, by `RecurrentConfig`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lexmill.errors import UserError
from lexmill.models.config import LayerOverride
from lexmill.models.trunk import Only, TokenEmbeddings, Trunk, known_states
from lexmill.nn.cache import Cache, RecurrentCache
from lexmill.nn.dropout import Dropout
from lexmill.nn.embedding import Embedding
from lexmill.nn.layout import Dense, Layout, Packed
from lexmill.nn.pooling import select

Cell = Literal["lstm", "gru"]
_CELLS: dict[Cell, type[nn.LSTM | nn.GRU]] = {"lstm": nn.LSTM, "gru": nn.GRU}


@dataclass(frozen=True)
class RecurrentConfig:
    """A recurrent trunk's structure.

    Args:
        cell: `lstm` (Hochreiter and Schmidhuber 1997) or `gru` (Cho et al. 2014).
        embedding_size: the width of token embeddings.
        state_size: the width of one direction's state.
        bidirectional: whether a second state comes from the end of the text (Schuster and Paliwal 1997). Without it a
            token sees only those before it.
        max_positions: the longest sequence that tasks may give it; nothing in the structure bounds it.
        tied_output: whether an output head shares the token embedding, which must then be as wide as the state.
        dropout: of embeddings, and of each layer's output.
        initializer_range: the standard deviation of new embeddings and heads.
        layers: always empty: the layers of a recurrent trunk do not differ.
    """

    vocab_size: int
    cell: Cell = "lstm"
    embedding_size: int = 128
    state_size: int = 256
    num_layers: int = 1
    bidirectional: bool = True
    max_positions: int = 1 << 20
    tied_output: bool = False
    dropout: float = 0.3
    initializer_range: float = 0.1
    layers: tuple[LayerOverride, ...] = ()

    def __post_init__(self) -> None:
        for name in ("vocab_size", "embedding_size", "state_size", "num_layers", "max_positions"):
            if getattr(self, name) < 1:
                raise UserError(f"must be at least 1, is {getattr(self, name)}", where=name)
        if self.layers:
            raise UserError("the layers of a recurrent model do not differ", where="layers", hint="leave it out")
        if self.tied_output and self.embedding_size != self.hidden_size:
            hint = f"make both as wide, or let the output have its own: embeddings {self.embedding_size} wide"
            raise UserError(f"the output is {self.hidden_size} wide and cannot be tied", where="tied_output", hint=hint)

    @property
    def hidden_size(self) -> int:
        """The width of the states that heads are given: those of both directions side by side."""
        return self.state_size * (2 if self.bidirectional else 1)

    @property
    def causal(self) -> bool:
        return not self.bidirectional

    @property
    def num_stored_layers(self) -> int:
        return self.num_layers

    @property
    def group_size(self) -> int:
        return 1


class RecurrentEmbeddings(TokenEmbeddings):
    """Token embeddings alone: the order of the tokens is the recurrence's own."""

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__()
        self.token = Embedding(config.vocab_size, config.embedding_size, sparse=True, role="vocab")
        self.dropout = Dropout(config.dropout)

    def forward(
        self, ids: Int[Tensor, "*rows"], inputs_embeds: Float[Tensor, "*rows embed"] | None
    ) -> Float[Tensor, "*rows embed"]:
        return self.dropout(self.token(ids) if inputs_embeds is None else inputs_embeds)


@dataclass(frozen=True)
class _Steps:
    """Rows in the order of time: the first token of every sequence, longest first, then the second tokens, and so on.

    Args:
        order: the sequences, longest first.
        rows: for each row in the order of time, its place in the layout; `restore` takes rows back.
        sizes: how many sequences are left at each time.
    """

    order: Int[Tensor, "seq"]
    rows: Int[Tensor, "tok"]
    restore: Int[Tensor, "tok"]
    sizes: Int[Tensor, "time"]

    @classmethod
    def of(cls, layout: Packed) -> _Steps:
        order = torch.argsort(layout.lengths, descending=True, stable=True)
        time = torch.arange(layout.max_length)
        here = time[:, None] < layout.lengths[order]
        rows = (layout.offsets[:-1][order] + time[:, None])[here]
        device = layout.device
        return cls(order.to(device), rows.to(device), torch.argsort(rows).to(device), here.sum(1))


class Recurrent(Trunk):
    """Embeddings and layers of torch's LSTM or GRU, which run over packed sequences: no padding is computed."""

    Config: ClassVar[type] = RecurrentConfig

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__()
        self.config: RecurrentConfig = config  # pyright: ignore[reportIncompatibleVariableOverride]
        self.exits = None
        self.embeddings: RecurrentEmbeddings = RecurrentEmbeddings(config)  # pyright: ignore[reportIncompatibleVariableOverride]
        widths = [config.embedding_size, *[config.hidden_size] * config.num_layers]
        self.layers = nn.ModuleList(
            _CELLS[config.cell](below, config.state_size, bidirectional=config.bidirectional)
            for below, _ in pairwise(widths)
        )
        self.dropout = Dropout(config.dropout)

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
        inputs_embeds: Float[Tensor, "*rows embed"] | None = None,
        until: int | None = None,
    ) -> Float[Tensor, "*some_rows dim"]:
        """See `Trunk.forward`. Positions and segment types play no part."""
        whole = cache is not None or collect is not None or inputs_embeds is not None
        known = None if whole else known_states(ids, layout, self.embeddings.token.like.dtype)
        start, x = known or (0, self.embeddings(ids, inputs_embeds))
        layers = range(start, len(self.layers) if until is None else until)
        if isinstance(layout, Dense):
            if cache is not None:
                raise TypeError("a cache needs a packed layout")
            packed = Packed.of(layout.lengths.cpu(), x.device)
            found: list[dict[str, Tensor]] = []
            x = _spread(self._run(x[layout.mask], packed, layers, None, found), layout)
            if collect is not None:
                collect += [{"hidden": _spread(seen["hidden"], layout)} for seen in found]
        else:
            x = self._run(x, layout, layers, cache, collect)
        return x if only == "all" else select(x, layout, only)

    def _run(
        self,
        x: Float[Tensor, "tok embed"],
        layout: Packed,
        layers: range,
        cache: Cache | None,
        collect: list[dict[str, Tensor]] | None,
    ) -> Float[Tensor, "tok dim"]:
        if not torch.compiler.is_compiling():
            self.layer_rows += len(x) * len(layers)
            self.known_rows += len(x) * layers.start
        if cache is not None and not isinstance(cache, RecurrentCache):
            raise TypeError("a recurrent trunk needs a recurrent cache")
        steps = layout.plan_for(layout, "steps", lambda: _Steps.of(layout))
        if collect is not None:
            collect.append({"hidden": x})
        x = x.index_select(0, steps.rows)
        for index in layers:
            before = None if cache is None else cache.states(index, steps.order)
            out, after = self.layers[index](PackedSequence(x, steps.sizes), before)
            x = self.dropout(out.data)
            if cache is not None:
                cache.store(index, steps.order, after)
            if collect is not None:
                collect.append({"hidden": x.index_select(0, steps.restore)})
        if cache is not None:
            cache.lengths = cache.lengths + layout.lengths
        return x.index_select(0, steps.restore)

    def new_cache(self, num_sequences: int, capacity: int) -> RecurrentCache:
        """The states so far, which take the same room however many tokens made them. A `UserError` where the model
        reads both ways, since its states then depend on tokens to come."""
        if self.config.bidirectional:
            hint = "train one with bidirectional: false in its config.json"
            raise UserError("a model that reads both ways cannot continue a text", hint=hint)
        return RecurrentCache(self.config.num_layers, num_sequences)

    def initialise(self, generator: torch.Generator | None = None) -> None:
        """Embeddings from a normal distribution; the rest uniform within 1 / sqrt(state), as torch has it, but an
        LSTM's forget gates start open (Jozefowicz et al. 2015)."""
        size = self.config.state_size
        bound = 1 / math.sqrt(size)
        with torch.no_grad():
            self.embeddings.token.weight.normal_(0.0, self.config.initializer_range, generator=generator)
            for name, parameter in self.layers.named_parameters():
                parameter.uniform_(-bound, bound, generator=generator)
                if self.config.cell == "lstm" and "bias_ih" in name:
                    parameter[size : 2 * size] += 1.0

    def matrices(self, part: nn.Module) -> list[Tensor]:
        return [parameter for name, parameter in part.named_parameters() if name.startswith("weight_")]


def _spread(rows: Float[Tensor, "tok dim"], layout: Dense) -> Float[Tensor, "seq len dim"]:
    """Rows side by side again, 0 at the padding."""
    out = rows.new_zeros(*layout.mask.shape, rows.shape[-1])
    return out.masked_scatter(layout.mask.unsqueeze(-1), rows)
