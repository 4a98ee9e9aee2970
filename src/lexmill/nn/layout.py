"""How the rows of a hidden state are arranged. Only attention, recurrence and pooling look at a layout."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lexmill.nn.matmul import fitting_rows

CPU = torch.device("cpu")
P = TypeVar("P")


@dataclass(frozen=True, eq=False)
class Known:
    """Hidden states that were computed before: `rows` are those that enter layer `layer` for the tokens `ids`."""

    layer: int
    ids: Int[Tensor, "tok"]
    rows: Float[Tensor, "tok dim"]

    def take(self, rows: Int[Tensor, "near_tok"]) -> Known:
        """These rows, in this order."""
        return Known(self.layer, self.ids[rows], self.rows.index_select(0, rows))


@dataclass(frozen=True, eq=False)
class Packed:
    """Sequences laid end to end in `[tok, dim]`; sequence `i` holds rows `offsets[i]` to `offsets[i + 1]`.

    `offsets` stays on the CPU: grouping by length reads it as numbers.

    Args:
        known: what need not be computed again of these rows.
    """

    offsets: Int[Tensor, "bounds"]
    device: torch.device = CPU
    known: Known | None = None
    _plans: dict[Hashable, object] = field(default_factory=dict[Hashable, object], init=False, repr=False)

    @classmethod
    def of(cls, lengths: Sequence[int] | Int[Tensor, "seq"], device: torch.device | None = None) -> Packed:
        """The layout of sequences of these lengths."""
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
        torch.cumsum(torch.as_tensor(lengths, dtype=torch.int64), 0, out=offsets[1:])
        return cls(offsets, device or CPU)

    @cached_property
    def lengths(self) -> Int[Tensor, "seq"]:
        return self.offsets.diff()

    @cached_property
    def max_length(self) -> int:
        return int(self.lengths.max()) if len(self.lengths) else 0

    @cached_property
    def single(self) -> Packed:
        """The layout of one token a sequence: what is left after choosing the first or the last."""
        return Packed(torch.arange(len(self.offsets)), self.device)

    @cached_property
    def cu_seqlens(self) -> Int[Tensor, "bounds"]:
        """The offsets as variable-length kernels want them: int32, on the device."""
        return self.offsets.to(self.device, torch.int32)

    def plan_for(self, keys: Packed, kind: Hashable, make: Callable[[], P]) -> P:
        """What attention worked out once for these queries and keys; `kind` is whatever else it depends on."""
        key = (None if keys is self else keys, kind)
        if key not in self._plans:
            self._plans[key] = make()
        return cast("P", self._plans[key])

    @property
    def num_sequences(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    @cached_property
    def first(self) -> Int[Tensor, "seq"]:
        """The row of each sequence's first token."""
        return self.offsets[:-1].to(self.device)

    @cached_property
    def last(self) -> Int[Tensor, "seq"]:
        """The row of each sequence's last token."""
        return (self.offsets[1:] - 1).to(self.device)

    @cached_property
    def grouped(self) -> Regrouped | None:
        """The same sequences ordered by length, so that those of equal length are neighbours, and as many rows as the
        matrix products like (`matmul.fitting_rows`), with one more sequence of copies where need be; None where all
        that is so already."""
        filler = fitting_rows(self.num_tokens, self.device) - self.num_tokens
        values, runs = torch.unique_consecutive(self.lengths).unique(return_counts=True)
        if not filler and (len(values) == 0 or int(runs.max()) == 1):
            return None
        lengths = torch.cat([self.lengths, torch.tensor([filler])]) if filler else self.lengths
        order = torch.argsort(lengths, stable=True)
        layout = Packed.of(lengths[order], self.device)
        place = torch.argsort(order)
        restore = layout.rows_of(place[: self.num_sequences])
        rows = torch.zeros(layout.num_tokens, dtype=torch.int64)
        rows[restore] = torch.arange(self.num_tokens)
        rows = rows.to(self.device)
        if self.known is not None:
            layout = replace(layout, known=self.known.take(rows))
        return Regrouped(layout, rows, restore.to(self.device), place[: self.num_sequences].to(self.device))

    def rows_of(self, order: Int[Tensor, "some"]) -> Int[Tensor, "rows"]:
        """The rows of these sequences, in this order, on the CPU."""
        lengths = self.lengths[order]
        ends = lengths.cumsum(0)
        shift = torch.repeat_interleave(self.offsets[:-1][order] - ends + lengths, lengths)
        return shift + torch.arange(len(shift))

    @cached_property
    def padded(self) -> Padded:
        """Where each row goes when sequences are laid side by side."""
        column = torch.arange(self.max_length)
        mask = column < self.lengths[:, None]
        rows = torch.where(mask, self.offsets[:-1, None] + column, 0)
        return Padded(rows.to(self.device), mask.flatten().nonzero().flatten().to(self.device), mask.to(self.device))

    @cached_property
    def side_by_side(self) -> Dense:
        """The layout of the sequences when they are laid as `padded` says."""
        return Dense(self.padded.mask, full=self.num_sequences == 1)

    @cached_property
    def sequence(self) -> Int[Tensor, "tok"]:
        """The sequence that each row belongs to."""
        return torch.repeat_interleave(torch.arange(self.num_sequences), self.lengths).to(self.device)


@dataclass(frozen=True)
class Regrouped:
    """A layout with its sequences in another order, and perhaps one more.

    Args:
        rows: for each row of `layout`, the row of the original; row 0 where it is a copy.
        restore_rows: for each row of the original, its place in `layout`.
        restore_sequences: for each sequence of the original, its place in `layout`.
    """

    layout: Packed
    rows: Int[Tensor, "near_tok"]
    restore_rows: Int[Tensor, "tok"]
    restore_sequences: Int[Tensor, "seq"]


@dataclass(frozen=True)
class Padded:
    """Packed rows laid side by side and back: `rows` picks them (row 0 at the padding), `cells` are the real ones."""

    rows: Int[Tensor, "seq len"]
    cells: Int[Tensor, "tok"]
    mask: Bool[Tensor, "seq len"]


@dataclass(frozen=True, eq=False)
class Dense:
    """Sequences side by side in `[seq, len, dim]`, padded at the right; `mask` is True at real tokens.

    For ONNX, per-example gradients, and as the slow, obvious oracle of the packed path.

    Args:
        full: whether it is known that there is no padding.
    """

    mask: Bool[Tensor, "seq len"]
    full: bool = False
    _seen: dict[Hashable, Tensor] = field(default_factory=dict[Hashable, Tensor], init=False, repr=False)

    def seen_by(self, queries: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """What attention worked out once of which of these keys are seen by such queries, for all layers."""
        if queries not in self._seen:
            self._seen[queries] = make()
        return self._seen[queries]

    @cached_property
    def lengths(self) -> Int[Tensor, "seq"]:
        return self.mask.sum(-1)

    @property
    def num_sequences(self) -> int:
        return self.mask.shape[0]

    @cached_property
    def single(self) -> Dense:
        """The layout of one token a sequence: what is left after choosing the first or the last."""
        return Dense(self.mask.new_ones(self.mask.shape[0], 1))


Layout = Packed | Dense
