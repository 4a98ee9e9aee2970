"""`Example` and `Batch`: what a task makes of text, and what a model is given. Numpy only, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, Int

IGNORE = -100
"""A token label of this value has no label (the convention of the field)."""


@dataclass(frozen=True)
class Tokens:
    """One sequence of token ids; `types` are segment ids (0 for the first text of a pair, 1 for the second)."""

    ids: Int[np.ndarray, "tok"]
    types: Int[np.ndarray, "tok"] | None = None


@dataclass(frozen=True)
class Example:
    """One example, tokenized.

    Args:
        streams: sequences by stream name (`source`, `target`); several where an example has pairs, windows or choices.
        labels: per head, a scalar or a fixed-length vector. A head without an entry has no label here.
        token_labels: by `STREAM.HEAD`, or `HEAD` alone for the first stream, one label a token, `IGNORE` where there
            is none. A head without an entry has no labels here.
        weight: how much the example counts in the loss.
    """

    streams: Mapping[str, tuple[Tokens, ...]]
    labels: Mapping[str, np.ndarray] = field(default_factory=dict)
    token_labels: Mapping[str, Int[np.ndarray, "tok"]] = field(default_factory=dict)
    weight: float = 1.0


@dataclass(frozen=True)
class Kept:
    """What a model computed of the tokens `ids` before: the hidden states that enter its layer `layer`.

    Args:
        rows: float32, or bfloat16 as its bits in int16.
    """

    layer: int
    ids: Int[np.ndarray, "tok"]
    rows: Float[np.ndarray, "tok dim"] | Int[np.ndarray, "tok dim"]


@dataclass(frozen=True)
class Stream:
    """Sequences laid end to end: sequence `i` holds tokens `offsets[i]` to `offsets[i + 1]`.

    `positions` restart at 0 in each sequence; `example[i]` is the row of the batch that sequence `i` belongs to, in
    order of rows. `kept` holds only as long as the ids are those it was computed of.
    """

    ids: Int[np.ndarray, "tok"]
    types: Int[np.ndarray, "tok"]
    positions: Int[np.ndarray, "tok"]
    offsets: Int[np.ndarray, "seq+1"]
    example: Int[np.ndarray, "seq"]
    kept: Kept | None = None

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def lengths(self) -> Int[np.ndarray, "seq"]:
        return np.diff(self.offsets)

    def part(self, start: int, stop: int) -> Stream:
        """Sequences `start` to `stop`, of the same rows of the batch; nothing is `kept`."""
        begin, end = int(self.offsets[start]), int(self.offsets[stop])
        return Stream(
            self.ids[begin:end],
            self.types[begin:end],
            self.positions[begin:end],
            self.offsets[start : stop + 1] - begin,
            self.example[start:stop],
        )


@dataclass(frozen=True)
class Batch:
    """Examples ready for a model.

    Args:
        streams: by name.
        labels: per head, `[example]`, `[example, width]` or (token labels) `[tok]`; 0 where missing.
        masks: per head, the shape of its labels' items; False where the label is missing.
        weight: one weight an example.
    """

    streams: Mapping[str, Stream]
    labels: Mapping[str, np.ndarray]
    masks: Mapping[str, Bool[np.ndarray, "item"]]
    weight: Float[np.ndarray, "example"]

    @property
    def num_examples(self) -> int:
        return len(self.weight)

    @property
    def num_tokens(self) -> int:
        return sum(stream.num_tokens for stream in self.streams.values())


def pack(sequences: Sequence[Tokens], example: Sequence[int]) -> Stream:
    """Lay sequences end to end. Sequences must not be empty: an empty one has no first token to pool."""
    lengths = np.fromiter((len(seq.ids) for seq in sequences), dtype=np.int64, count=len(sequences))
    if len(lengths) and lengths.min() == 0:
        raise ValueError(f"sequence {int(lengths.argmin())} is empty; a tokenizer must give at least one token")
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    total = int(offsets[-1])
    ids = np.concatenate([seq.ids for seq in sequences]).astype(np.int64) if total else np.zeros(0, np.int64)
    types = np.zeros(total, np.int64)
    for start, seq in zip(offsets, sequences, strict=False):
        if seq.types is not None:
            types[start : start + len(seq.types)] = seq.types
    positions = np.arange(total) - np.repeat(offsets[:-1], lengths)
    return Stream(ids, types, positions, offsets, np.asarray(example, dtype=np.int64))


def collate(examples: Sequence[Example], heads: Mapping[str, np.ndarray] | None = None) -> Batch:
    """Pack examples into one batch.

    Args:
        heads: per example-level head, the value that stands in where a label is missing, which fixes its shape and
            dtype. Without it, heads are those seen in these examples.
    """
    names = list(dict.fromkeys(name for example in examples for name in example.streams))
    streams = {}
    for name in names:
        owned = [(seq, row) for row, example in enumerate(examples) for seq in example.streams.get(name, ())]
        streams[name] = pack([seq for seq, _ in owned], [row for _, row in owned])
    blanks: dict[str, np.ndarray] = dict(heads or {})
    for example in examples:
        for head, label in example.labels.items():
            blanks.setdefault(head, np.zeros_like(label))
    labels: dict[str, np.ndarray] = {}
    masks: dict[str, np.ndarray] = {}
    for head, blank in blanks.items():
        labels[head] = np.stack([np.asarray(example.labels.get(head, blank)) for example in examples])
        masks[head] = np.array([head in example.labels for example in examples])
    for head in dict.fromkeys(name for example in examples for name in example.token_labels):
        flat = np.concatenate([_token_labels(example, head) for example in examples])
        masks[head] = flat != IGNORE
        labels[head] = np.where(masks[head], flat, 0)
    return Batch(streams, labels, masks, np.array([example.weight for example in examples], dtype=np.float32))


def join(batches: Sequence[Batch]) -> Batch:
    """Batches of the same streams and heads as one, their examples in order; nothing is `kept`."""
    if len(batches) == 1:
        return batches[0]
    sizes = np.cumsum([0, *(batch.num_examples for batch in batches)])
    streams: dict[str, Stream] = {}
    for name in batches[0].streams:
        parts = [batch.streams[name] for batch in batches]
        starts = np.cumsum([0, *(part.num_tokens for part in parts)])
        streams[name] = Stream(
            np.concatenate([part.ids for part in parts]),
            np.concatenate([part.types for part in parts]),
            np.concatenate([part.positions for part in parts]),
            np.concatenate([[0], *(part.offsets[1:] + start for part, start in zip(parts, starts, strict=False))]),
            np.concatenate([part.example + size for part, size in zip(parts, sizes, strict=False)]),
        )
    labels = {head: np.concatenate([batch.labels[head] for batch in batches]) for head in batches[0].labels}
    masks = {head: np.concatenate([batch.masks[head] for batch in batches]) for head in batches[0].masks}
    return Batch(streams, labels, masks, np.concatenate([batch.weight for batch in batches]))


def _token_labels(example: Example, head: str) -> Int[np.ndarray, "tok"]:
    given = example.token_labels.get(head)
    if given is not None:
        return given
    stream = example.streams.get(head.partition(".")[0]) or next(iter(example.streams.values()), ())
    return np.full(sum(len(seq.ids) for seq in stream), IGNORE, np.int64)
