"""The token cache: tokenized examples on disk, read by memory map.

A cache is a directory of flat arrays and an `index.json`. Examples are written as they come, so neither building nor
reading holds the data in memory. Offsets count from 0 and have one entry more than there are things:

    stream 0 … n    ids int32, types uint8     by token
                    offsets int64              by sequence, into the tokens
                    sequences int64            by example, into the sequences
    head 0 … n      values (its own dtype)     by example, 0 where the label is missing; mask bool
    tokens 0 … n    values int32               by token; offsets int64 by example, into the values
    weight          float32                    by example
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from lexmill.data.batch import IGNORE, Batch, Example, Stream, Tokens, collate
from lexmill.data.cache_writer import FORMAT, VERSION, Writer
from lexmill.data.fingerprint import content_sha256
from lexmill.data.sources import Source
from lexmill.errors import Failure, UserError

_CHUNK = 1024
_ABANDONED_AFTER = 3600
"""Seconds without a write."""


def cache_key(sources: Sequence[Source], tokenizer_fingerprint: str, preprocessing: Mapping[str, Any]) -> str:
    """What a cache depends on: the bytes of the files, how they are read, the tokenizer and the preprocessing.

    Args:
        preprocessing: all else that decides the tokens and labels, as JSON.
    """
    files = [{"sha256": content_sha256(source), **vars(source.reading)} for source in sources]
    parts = {"version": VERSION, "files": files, "tokenizer": tokenizer_fingerprint, "preprocessing": preprocessing}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def encode_chunks(
    rows: Iterable[Any], encode: Callable[[list[Any]], Sequence[Example]], chunk: int = _CHUNK
) -> Iterator[Example]:
    """Tokenize rows a chunk at a time; `encode_batch` of the tokenizers library uses every core within a chunk."""
    remaining = iter(rows)
    while records := list(islice(remaining, chunk)):
        yield from encode(records)


def build_cache(directory: str | Path, examples: Iterable[Example], key: str) -> TokenCache:
    """The cache in `directory`, made of `examples` unless it is there already with this key.

    It is written beside its place and renamed, so that a cache is whole or absent. One with another key is replaced.

    Raises:
        UserError: `directory` is something other than a token cache, or cannot be written.
        Failure: the disk is full.
    """
    directory = Path(directory)
    found = _existing(directory, key)
    if found is not None:
        return found
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(directory)
        partial = Path(tempfile.mkdtemp(prefix=f"{directory.name}.", suffix=".partial", dir=directory.parent))
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror or error}", where=str(directory)) from error
    try:
        with Writer(partial) as writer:
            remaining = iter(examples)
            while chunk := list(islice(remaining, _CHUNK)):
                writer.add(chunk)
            writer.finish(key)
        _move(partial, directory, key)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        hint = "free some space, or put the cache on another disk"
        raise Failure("the disk is full", where=str(directory), hint=hint) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return TokenCache.open(directory)


def _existing(directory: Path, key: str) -> TokenCache | None:
    if not directory.exists():
        return None
    if not (directory / "index.json").is_file():
        if directory.is_dir() and not any(directory.iterdir()):
            return None
        hint = "choose another place for the cache"
        raise UserError("exists and is not a token cache", where=str(directory), hint=hint)
    try:
        cache = TokenCache.open(directory)
    except UserError:
        return None  # damaged, or of another version: it is made again
    return cache if cache.key == key else None


def _remove_abandoned(directory: Path) -> None:
    """Remove what killed runs left half-written. A run that is still writing touches its files every few seconds."""
    for torn in directory.parent.glob(f"{glob.escape(directory.name)}.*.partial"):
        newest = max(path.stat().st_mtime for path in (torn, *torn.iterdir()))
        if time.time() - newest > _ABANDONED_AFTER:
            shutil.rmtree(torn, ignore_errors=True)


def _move(partial: Path, directory: Path, key: str) -> None:
    if _existing(directory, key) is not None:
        return  # another process was faster
    if directory.exists():
        shutil.rmtree(directory)
    partial.rename(directory)


class TokenCache:
    """Tokenized examples, read by memory map: `cache[i]` is an `Example`, `cache.batch(indices)` a `Batch`.

    Attributes:
        key: what it was built from, see `cache_key`.
        heads: per example-level head the value that stands in for a missing label, as `collate` takes it.
    """

    def __init__(self, directory: Path, index: Mapping[str, Any]) -> None:
        self.key: str = index["key"]
        self._directory = directory
        self._size: int = index["examples"]
        self._sizes: Mapping[str, int] = index["files"]
        self._streams = {name: _StreamArrays(self._array, at) for at, name in enumerate(index["streams"])}
        self.heads: dict[str, np.ndarray] = {}
        self._values: dict[str, np.ndarray] = {}
        self._masks: dict[str, np.ndarray] = {}
        for at, (name, head) in enumerate(index["heads"].items()):
            self.heads[name] = np.zeros(head["shape"], head["dtype"])
            flat = self._array(f"head{at}.values", head["dtype"])
            self._values[name] = flat.reshape(self._size, *head["shape"])
            self._masks[name] = self._array(f"head{at}.mask", "bool")
        self._token_labels = {
            name: (self._array(f"tokens{at}.values", "int32"), self._array(f"tokens{at}.offsets", "int64"))
            for at, name in enumerate(index["tokens"])
        }
        self._weight = self._array("weight", "float32")

    @classmethod
    def open(cls, directory: str | Path) -> TokenCache:
        """Open a cache. Raises `UserError` where there is none, or it is damaged or of another version."""
        directory = Path(directory)
        again = "delete it, and it will be made again"
        try:
            index = json.loads((directory / "index.json").read_bytes())
            version = (index["format"], index["version"])
            sizes = {name: (directory / name).stat().st_size for name in index["files"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError("no token cache that can be read", where=str(directory), hint=again) from error
        if version != (FORMAT, VERSION):
            raise UserError("a token cache of another version", where=str(directory), hint=again)
        for name, size in index["files"].items():
            if sizes[name] != size:
                raise UserError(f"{sizes[name]} bytes instead of {size}", where=str(directory / name), hint=again)
        return cls(directory, index)

    def __len__(self) -> int:
        return self._size

    @cached_property
    def lengths(self) -> Int[np.ndarray, "example"]:
        """Tokens of each example, over all streams."""
        total = np.zeros(self._size, np.int64)
        for stream in self._streams.values():
            total += np.diff(stream.offsets[stream.sequences])
        return total

    def classes(self) -> Int[np.ndarray, "example"]:
        """The one label of each example as a number. A `UserError` where examples have other labels than that."""
        if len(self.heads) == 1 and not self._token_labels:
            ((name, blank),) = self.heads.items()
            if blank.ndim == 0 and blank.dtype.kind == "i" and self._masks[name].all():
                return np.asarray(self._values[name], np.int64)
        hint = "leave train.balanced out, or train one head with one label for every text"
        raise UserError("the examples do not have one class each", where="train.balanced", hint=hint)

    def __getitem__(self, index: int) -> Example:
        if not -self._size <= index < self._size:
            raise IndexError(f"example {index} of a cache of {self._size}")
        at = index % self._size
        streams = {name: stream.example(at) for name, stream in self._streams.items()}
        labels = {name: self._values[name][at].copy() for name, mask in self._masks.items() if mask[at]}
        token_labels: dict[str, np.ndarray] = {}
        for name, (values, offsets) in self._token_labels.items():
            if offsets[at + 1] > offsets[at]:
                token_labels[name] = values[offsets[at] : offsets[at + 1]].astype(np.int64)
        present = {name: sequences for name, sequences in streams.items() if sequences}
        return Example(present, labels, token_labels, float(self._weight[at]))

    def batch(self, indices: Int[np.ndarray, "example"]) -> Batch:
        """The examples packed: what `collate([cache[i] for i in indices], cache.heads)` gives, gathered at once."""
        indices = np.asarray(indices, dtype=np.int64)
        streams = {name: stream.gather(indices) for name, stream in self._streams.items()}
        streams = {name: stream for name, stream in streams.items() if len(stream.example)}
        labels = {name: values[indices] for name, values in self._values.items()}
        masks = {name: mask[indices] for name, mask in self._masks.items()}
        for name, (values, offsets) in self._token_labels.items():
            counts = offsets[indices + 1] - offsets[indices]
            if not counts.all():  # some examples lack these labels: rare enough for the plain way
                return collate([self[index] for index in indices.tolist()], self.heads)
            flat = values[_ranges(offsets[indices], counts)].astype(np.int64)
            masks[name] = flat != IGNORE
            labels[name] = np.where(masks[name], flat, 0)
        return Batch(streams, labels, masks, self._weight[indices])

    def _array(self, name: str, dtype: str) -> np.ndarray:
        if not self._sizes[name]:
            return np.zeros(0, dtype)  # an empty file cannot be mapped
        # A plain array over the map: indexing the subclass `memmap` costs several times as much.
        return np.asarray(np.memmap(self._directory / name, dtype=dtype, mode="r"))


class _StreamArrays:
    """The arrays of one stream."""

    def __init__(self, array: Callable[[str, str], np.ndarray], at: int) -> None:
        self.ids = array(f"stream{at}.ids", "int32")
        self.types = array(f"stream{at}.types", "uint8")
        self.offsets = array(f"stream{at}.offsets", "int64")
        self.sequences = array(f"stream{at}.sequences", "int64")

    def example(self, at: int) -> tuple[Tokens, ...]:
        cuts = self.offsets[self.sequences[at] : self.sequences[at + 1] + 1].tolist()
        return tuple(
            Tokens(self.ids[start:stop].astype(np.int64), self.types[start:stop].astype(np.int64))
            for start, stop in pairwise(cuts)
        )

    def gather(self, indices: Int[np.ndarray, "example"]) -> Stream:
        counts = self.sequences[indices + 1] - self.sequences[indices]
        sequences = _ranges(self.sequences[indices], counts)
        starts = self.offsets[sequences]
        lengths = self.offsets[sequences + 1] - starts
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        positions = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        tokens = np.repeat(starts, lengths) + positions
        example = np.repeat(np.arange(len(indices)), counts)
        return Stream(
            self.ids[tokens].astype(np.int64), self.types[tokens].astype(np.int64), positions, offsets, example
        )


def _ranges(starts: Int[np.ndarray, "n"], counts: Int[np.ndarray, "n"]) -> Int[np.ndarray, "total"]:
    """`starts[0], starts[0] + 1, …` for `counts[0]` numbers, then the same for the next start, end to end."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(int(counts.sum()))
