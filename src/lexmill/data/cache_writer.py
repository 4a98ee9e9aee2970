"""Writing a token cache, array by array, as examples come; `cache` says what the arrays are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from lexmill.data.batch import Example, Tokens

FORMAT = "lexmill token cache"
VERSION = 2
_NO_TOKENS = np.zeros(0, np.int32)


class Writer:
    """Writes the arrays of a cache into an empty directory; `finish` writes the index that makes it one."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, BinaryIO] = {}
        self._stack = ExitStack()
        self._examples = 0
        self._streams: dict[str, _StreamWriter] = {}
        self._heads: dict[str, _HeadWriter] = {}
        self._tokens: dict[str, _TokenLabelWriter] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stack.close()

    def write(self, name: str, array: np.ndarray) -> None:
        """Append an array to the file of this name."""
        if name not in self._files:
            self._files[name] = self._stack.enter_context((self._directory / name).open("wb"))
        self._files[name].write(np.ascontiguousarray(array).tobytes())

    def add(self, examples: Sequence[Example]) -> None:
        """Append examples. A stream or head seen for the first time is blank in the examples before."""
        for example in examples:
            for name in example.streams:
                if name not in self._streams:
                    self._streams[name] = _StreamWriter(self, f"stream{len(self._streams)}", self._examples)
            for name, label in example.labels.items():
                if name not in self._heads:
                    head = _HeadWriter(self, f"head{len(self._heads)}", np.asarray(label), self._examples)
                    self._heads[name] = head
            for name in example.token_labels:
                if name not in self._tokens:
                    self._tokens[name] = _TokenLabelWriter(self, f"tokens{len(self._tokens)}", self._examples)
        for name, stream in self._streams.items():
            stream.add([example.streams.get(name, ()) for example in examples])
        for name, head in self._heads.items():
            head.add([example.labels.get(name) for example in examples])
        for name, tokens in self._tokens.items():
            tokens.add([example.token_labels.get(name, _NO_TOKENS) for example in examples])
        self.write("weight", np.array([example.weight for example in examples], np.float32))
        self._examples += len(examples)

    def finish(self, key: str) -> None:
        """Close the arrays and write the index."""
        if not self._examples:
            self.write("weight", np.zeros(0, np.float32))
        self._stack.close()
        index: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "key": key,
            "examples": self._examples,
            "streams": list(self._streams),
            "heads": {
                name: {"dtype": head.blank.dtype.str, "shape": list(head.blank.shape)}
                for name, head in self._heads.items()
            },
            "tokens": list(self._tokens),
            "files": {name: (self._directory / name).stat().st_size for name in self._files},
        }
        (self._directory / "index.json").write_text(json.dumps(index, indent=1), "utf-8")


class _StreamWriter:
    def __init__(self, writer: Writer, name: str, missed: int) -> None:
        self._writer = writer
        self._name = name
        self._num_tokens = 0
        self._num_sequences = 0
        writer.write(f"{name}.offsets", np.zeros(1, np.int64))
        writer.write(f"{name}.sequences", np.zeros(missed + 1, np.int64))

    def add(self, examples: Sequence[Sequence[Tokens]]) -> None:
        counts = np.array([len(sequences) for sequences in examples], np.int64)
        sequences = [sequence for owned in examples for sequence in owned]
        lengths = np.array([len(sequence.ids) for sequence in sequences], np.int64)
        if len(lengths) and lengths.min() == 0:
            raise ValueError(f"an empty sequence near example {int(lengths.argmin())} of a chunk; see `pack`")
        types = [
            np.zeros(len(sequence.ids), np.uint8) if sequence.types is None else np.asarray(sequence.types, np.uint8)
            for sequence in sequences
        ]
        ends = self._num_tokens + np.cumsum(lengths)
        lasts = self._num_sequences + np.cumsum(counts)
        self._writer.write(f"{self._name}.ids", _flat([sequence.ids for sequence in sequences], np.int32))
        self._writer.write(f"{self._name}.types", _flat(types, np.uint8))
        self._writer.write(f"{self._name}.offsets", ends)
        self._writer.write(f"{self._name}.sequences", lasts)
        self._num_tokens += int(lengths.sum())
        self._num_sequences += len(sequences)


class _HeadWriter:
    def __init__(self, writer: Writer, name: str, first: np.ndarray, missed: int) -> None:
        self.blank = np.zeros_like(first)
        self._writer = writer
        self._name = name
        self._append([None] * missed)

    def add(self, labels: Sequence[np.ndarray | None]) -> None:
        for label in labels:
            if label is not None and np.shape(label) != self.blank.shape:
                raise ValueError(f"a label of shape {np.shape(label)} after ones of shape {self.blank.shape}")
        self._append(labels)

    def _append(self, labels: Sequence[np.ndarray | None]) -> None:
        values = np.zeros((len(labels), *self.blank.shape), self.blank.dtype)
        for at, label in enumerate(labels):
            if label is not None:
                values[at] = label
        self._writer.write(f"{self._name}.values", values)
        self._writer.write(f"{self._name}.mask", np.array([label is not None for label in labels], bool))


class _TokenLabelWriter:
    def __init__(self, writer: Writer, name: str, missed: int) -> None:
        self._writer = writer
        self._name = name
        self._total = 0
        writer.write(f"{name}.offsets", np.zeros(missed + 1, np.int64))

    def add(self, labels: Sequence[np.ndarray]) -> None:
        ends = self._total + np.cumsum([len(row) for row in labels], dtype=np.int64)
        self._writer.write(f"{self._name}.values", _flat(labels, np.int32))
        self._writer.write(f"{self._name}.offsets", ends)
        self._total = int(ends[-1])


def _flat(arrays: Sequence[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype)
