"""What is wrong with the data, before time is spent on it."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from jaxtyping import Bool, Int, UInt64

from lexmill.data.columns import Columns
from lexmill.data.sources import Row, Source

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Severity = Literal["info", "warning", "error"]
MAX_LABELS = 100_000
"""More distinct labels than this are not counted apart."""
_RARE = 5
_EXAMPLES = 3
_CHUNK = 1024


@dataclass(frozen=True)
class Finding:
    """One thing to know about the data. An error stops a training or an evaluation; a warning may harm it.

    Args:
        code: stable name, e.g. `duplicates`.
        count: rows, texts or labels concerned, as `message` says.
        path: of the file it was found in.
        examples: up to three, each with its `file:line`.
    """

    severity: Severity
    code: str
    message: str
    count: int
    examples: tuple[str, ...] = ()
    path: str = ""


@dataclass(frozen=True)
class Spread:
    """How long the texts are, in characters or in tokens."""

    mean: float
    p50: int
    p95: int
    max: int


@dataclass(frozen=True)
class Part:
    """One file: rows read and skipped, rows a label by label column (most frequent first), lengths of the texts."""

    path: str
    rows: int
    skipped: int
    labels: Mapping[str, Mapping[str, int]]
    chars: Spread
    tokens: Spread | None


@dataclass(frozen=True)
class DataReport:
    """What `check` found, file by file and all in all."""

    train: Part
    test: Part | None
    validation: Part | None
    columns: Columns
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing stands in the way of training."""
        return all(finding.severity != "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """As JSON; `columns` maps role to column."""
        return asdict(self) | {"columns": dict(self.columns)}

    def lines(self) -> list[str]:
        """As plain text."""
        out: list[str] = []
        for part in (self.train, self.test, self.validation):
            if part is None:
                continue
            skipped = f", {part.skipped:,} broken rows skipped" if part.skipped else ""
            labels = "".join(f", {len(counts):,} labels in '{column}'" for column, counts in part.labels.items())
            out.append(f"{part.path}: {part.rows:,} rows{labels}{skipped}")
            for unit, spread in (("characters", part.chars), ("tokens", part.tokens)):
                if spread is not None:
                    out.append(
                        f"  {unit} a text: mean {spread.mean:.1f}, median {spread.p50}, 95 % up to {spread.p95},"
                        f" longest {spread.max}"
                    )
        for finding in self.findings:
            out.append(f"{finding.severity}: {finding.message}")
            out.extend(f"  {example}" for example in finding.examples)
        return out


def check(
    train: Source,
    test: Source | None,
    columns: Columns,
    *,
    validation: Source | None = None,
    max_tokens: int | None = None,
    max_chars: int = 10_000,
    tokenizer: Tokenizer | None = None,
    apart: Collection[str] = (),
) -> DataReport:
    """Read the data once and report on it. Texts are hashed, not kept: a row takes some 60 bytes.

    Args:
        max_tokens: texts of more tokens, special ones included, are over-long; needs `tokenizer`.
        max_chars: texts of more characters are over-long.
        tokenizer: counts tokens, where given; its truncation must be off.
        apart: labels that training rows need not have.

    Raises:
        UserError: a file has no rows, or a broken one that the source does not skip.
    """
    named = {"train": train, "test": test, "validation": validation}
    scans = {name: _Scan(source, columns) for name, source in named.items() if source is not None}
    for scan in scans.values():
        scan.read(tokenizer, max_chars, max_tokens)
    hashes = np.concatenate([scan.hashes() for scan in scans.values()])
    texts = _identify(hashes[:, 0], hashes[:, 1])
    findings: list[Finding] = []
    start = 0
    for name, scan in scans.items():
        own = texts[start : start + scan.rows]
        found = [*scan.findings(), *_duplicates(scan, own)]
        for column, counts in scan.counts.items():
            found += _conflicts(scan, own, column)
            found += _classes(scan, column, counts, several=name == "train")
        if name != "train":
            found += _between(scans["train"], scan, np.concatenate([texts[: scans["train"].rows], own]), name, apart)
        findings += [replace(finding, path=str(scan.source.path)) for finding in found]
        start += scan.rows
    rank = {"error": 0, "warning": 1, "info": 2}
    findings.sort(key=lambda finding: rank[finding.severity])
    parts = {name: scan.part() for name, scan in scans.items()}
    return DataReport(parts["train"], parts.get("test"), parts.get("validation"), columns, tuple(findings))


def plain(value: Any) -> str:
    """The text of a cell; a list is one of words."""
    if isinstance(value, list):
        return " ".join(map(str, cast("list[Any]", value)))
    return "" if value is None else str(value)


def labels_in(value: Any, *, multi: bool) -> list[str]:
    """The labels of one cell: a list, `a|b` where several are expected, or one value; none where it is empty."""
    if value is None or value == "":
        return []
    if isinstance(value, (list, tuple)):
        return [str(item) for item in value]
    if multi:
        return [part.strip() for part in str(value).split("|") if part.strip()]
    return [str(value)]


@dataclass
class _Tally:
    """Rows that share a fault, and the first few."""

    count: int = 0
    examples: list[str] = field(default_factory=list[str])

    def add(self, example: str) -> None:
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(example)

    def finding(self, severity: Severity, code: str, message: str) -> list[Finding]:
        return [Finding(severity, code, message, self.count, tuple(self.examples))] if self.count else []


class _Scan:
    """What one pass over a file keeps: per row a hash of the text, one of each label, its line and its lengths."""

    def __init__(self, source: Source, columns: Columns) -> None:
        self.source = source
        self.columns = columns
        self.rows = 0
        self.counts: dict[str, Counter[str]] = {column: Counter() for column in columns.labels}
        self.names: dict[int, str] = {}
        self._lines = array("q")
        self._hashes = bytearray()
        self._labels = {column: array("Q") for column in columns.labels}
        self._chars = array("q")
        self._tokens = array("q")
        self._missing = _Tally()
        self._empty = _Tally()
        self._long_chars = _Tally()
        self._long_tokens = _Tally()
        self._needed = [column for column in columns.texts if column not in columns.may_be_empty]
        self._unlabelled = {column: _Tally() for column in columns.labels}
        self._uncounted = {column: _Tally() for column in columns.labels}
        self._limits: tuple[int, int | None] = (0, None)

    def read(self, tokenizer: Tokenizer | None, max_chars: int, max_tokens: int | None) -> None:
        self._limits = (max_chars, max_tokens)
        rows = iter(self.source)
        while chunk := list(islice(rows, _CHUNK)):
            texts = [self._texts(row) for row in chunk]
            for row, parts in zip(chunk, texts, strict=True):
                self._row(row, parts)
            if tokenizer is not None:
                self._count_tokens(chunk, texts, tokenizer)

    def _texts(self, row: Row) -> tuple[str, ...]:
        values = ((column, plain(row.values.get(column))) for column in self.columns.texts)
        return tuple(value for column, value in values if value.strip() or column not in self.columns.may_be_empty)

    def where(self, row: Row) -> str:
        return self.source.where(row.line)

    def _row(self, row: Row, parts: tuple[str, ...]) -> None:
        self.rows += 1
        self._lines.append(row.line)
        chars = sum(map(len, parts))
        self._chars.append(chars)
        filled = all(part.strip() for part in parts)
        self._hashes += hashlib.blake2b(_joined(parts), digest_size=16).digest() if filled else bytes(16)
        missing = next((name for name in self._needed if row.values.get(name) is None), None)
        if missing is not None:
            self._missing.add(f"{self.where(row)}: no '{missing}'")
        elif not filled:
            self._empty.add(self.where(row))
        if chars > self._limits[0]:
            self._long_chars.add(f"{self.where(row)}: {chars:,} characters: {_snippet(parts)}")
        for column, keys in self._labels.items():
            labels = labels_in(row.values.get(column), multi=self.columns.multi_label)
            keys.append(self._label_key(labels))
            counter = self.counts[column]
            for label in labels:
                if label in counter or len(counter) < MAX_LABELS:
                    counter[label] += 1
                else:
                    self._uncounted[column].add(f"{self.where(row)}: '{label}'")
            if not labels and (not self.columns.multi_label or row.values.get(column) is None):
                self._unlabelled[column].add(self.where(row))

    def _label_key(self, labels: list[str]) -> int:
        """A number for a set of labels; 0 stands for none."""
        if not labels:
            return 0
        joined = _joined(tuple(sorted(labels)))
        key = int.from_bytes(hashlib.blake2b(joined, digest_size=8).digest(), "little") | 1
        if len(self.names) < MAX_LABELS:
            self.names.setdefault(key, ", ".join(labels))
        return key

    def _count_tokens(self, chunk: list[Row], texts: list[tuple[str, ...]], tokenizer: Tokenizer) -> None:
        inputs = [parts if len(parts) == 2 else parts[0] for parts in texts]
        limit = self._limits[1]
        for row, parts, encoding in zip(chunk, texts, tokenizer.encode_batch_fast(inputs), strict=True):
            length = len(encoding.ids)
            self._tokens.append(length)
            if limit is not None and length > limit:
                self._long_tokens.add(f"{self.where(row)}: {length:,} tokens: {_snippet(parts)}")

    def at(self, row: int) -> str:
        return self.source.where(self._lines[row])

    def hashes(self) -> UInt64[np.ndarray, "row 2"]:
        return np.frombuffer(self._hashes, dtype="<u8").reshape(-1, 2)

    def filled(self) -> Bool[np.ndarray, "row"]:
        """Rows that have a text."""
        hashes = self.hashes()
        return (hashes[:, 0] | hashes[:, 1]) != 0

    def label_keys(self, column: str) -> UInt64[np.ndarray, "row"]:
        return np.frombuffer(self._labels[column], dtype=np.uint64)

    def part(self) -> Part:
        labels = {column: dict(counts.most_common()) for column, counts in self.counts.items()}
        tokens = _spread(self._tokens) if self._tokens else None
        skipped = self.source.skipped.count
        return Part(str(self.source.path), self.rows, skipped, labels, _spread(self._chars), tokens)

    def findings(self) -> Iterator[Finding]:
        name = self.source.path.name
        skipped = self.source.skipped
        if skipped.count:
            message = f"{skipped.count:,} broken rows of {name} were skipped"
            yield Finding("warning", "skipped", message, skipped.count, tuple(skipped.messages[:_EXAMPLES]))
        yield from self._missing.finding("error", "missing_text", f"{self._missing.count:,} rows of {name} lack a text")
        severity = "error" if self._empty.count == self.rows else "warning"
        yield from self._empty.finding(severity, "empty_text", f"{self._empty.count:,} texts of {name} are empty")
        chars, tokens = self._limits
        message = f"{self._long_chars.count:,} texts of {name} are longer than {chars:,} characters"
        yield from self._long_chars.finding("info", "long_text", message)
        message = f"{self._long_tokens.count:,} texts of {name} are longer than {tokens} tokens and will be cut"
        yield from self._long_tokens.finding("warning", "cut_text", message)
        for column, tally in self._unlabelled.items():
            several = len(self._unlabelled) > 1
            message = f"{tally.count:,} rows of {name} have no label in '{column}'"
            yield from tally.finding("info" if several else "warning", "missing_label", message)
        for column, tally in self._uncounted.items():
            message = f"column '{column}' of {name} has over {MAX_LABELS:,} distinct values; is it a label?"
            yield from tally.finding("error", "many_labels", message)


def _joined(parts: tuple[str, ...]) -> bytes:
    """Parts as bytes, so that different parts never give the same bytes."""
    return "".join(f"{len(part)}:{part}" for part in parts).encode()


def _snippet(parts: tuple[str, ...]) -> str:
    text = " ".join(" ".join(parts)[:200].split())
    return f"{text[:60]}…" if len(text) > 60 else text


def _spread(values: array[int]) -> Spread:
    lengths = np.frombuffer(values, dtype=np.int64)
    p50, p95 = np.percentile(lengths, [50, 95], method="inverted_cdf")
    return Spread(round(float(lengths.mean()), 2), int(p50), int(p95), int(lengths.max()))


def _identify(*keys: np.ndarray) -> Int[np.ndarray, "row"]:
    """The same number, from 0, for rows that agree in every key."""
    order = np.lexsort(keys)
    differs = np.zeros(len(order), dtype=bool)
    for key in keys:
        ordered = key[order]
        differs[1:] |= ordered[1:] != ordered[:-1]
    ids = np.empty(len(order), dtype=np.int64)
    ids[order] = np.cumsum(differs)
    return ids


def _first(ids: Int[np.ndarray, "row"]) -> Int[np.ndarray, "row"]:
    """For each row the first row of the same number."""
    first = np.zeros(int(ids.max()) + 1, dtype=np.int64)
    first[ids[::-1]] = np.arange(len(ids))[::-1]
    return first[ids]


def _duplicates(scan: _Scan, texts: Int[np.ndarray, "row"]) -> list[Finding]:
    labels = [scan.label_keys(column) for column in scan.columns.labels]
    first = _first(_identify(texts, *labels))
    repeats = np.flatnonzero((first != np.arange(len(first))) & scan.filled())
    if not len(repeats):
        return []
    examples = tuple(f"{scan.at(row)} repeats {scan.at(int(first[row]))}" for row in repeats[:_EXAMPLES].tolist())
    message = f"{len(repeats):,} rows of {scan.source.path.name} repeat an earlier row, label included"
    return [Finding("warning", "duplicates", message, len(repeats), examples)]


def _conflicts(scan: _Scan, texts: Int[np.ndarray, "row"], column: str) -> list[Finding]:
    keys = scan.label_keys(column)
    rows = np.flatnonzero(scan.filled() & (keys != 0))
    if not len(rows):
        return []
    first = _first(texts[rows])
    other = np.flatnonzero(keys[rows[first]] != keys[rows])
    _, where = np.unique(texts[rows][other], return_index=True)
    if not len(where):
        return []
    examples: list[str] = []
    for at in np.sort(where)[:_EXAMPLES].tolist():
        pair = (int(rows[first[other[at]]]), int(rows[other[at]]))
        examples.append(" but ".join(f"{scan.at(row)} says '{scan.names.get(int(keys[row]), '…')}'" for row in pair))
    message = f"{len(where):,} texts of {scan.source.path.name} have conflicting labels in '{column}'"
    return [Finding("warning", "conflicts", message, len(where), tuple(examples))]


def _between(
    train: _Scan, test: _Scan, texts: Int[np.ndarray, "row"], name: str, apart: Collection[str]
) -> Iterator[Finding]:
    filled = np.concatenate([train.filled(), test.filled()])
    first = _first(texts)
    shared = np.flatnonzero((first < train.rows) & filled)
    shared = shared[shared >= train.rows]
    if len(shared):
        examples = tuple(
            f"{test.at(row - train.rows)} is also {train.at(int(first[row]))}" for row in shared[:_EXAMPLES].tolist()
        )
        message = f"{len(shared):,} {name} texts are in the training data too: {name} scores flatter the model"
        yield Finding("warning", "overlap", message, len(shared), examples)
    for column, counts in test.counts.items():
        unseen = [label for label in counts if label not in train.counts[column] and label not in apart]
        if unseen and train.counts[column]:
            examples = tuple(f"'{label}', {counts[label]:,} {name} rows" for label in unseen[:_EXAMPLES])
            message = f"{len(unseen):,} labels in '{column}' are in the {name} data but not in the training data"
            yield Finding("error", "unseen_label", message, len(unseen), examples)


def _classes(scan: _Scan, column: str, counts: Counter[str], *, several: bool) -> Iterator[Finding]:
    name = scan.source.path.name
    if not counts:
        yield Finding("error", "no_labels", f"no row of {name} has a label in '{column}'", scan.rows)
    elif several and len(counts) == 1:
        label = next(iter(counts))
        message = f"every label of {name} in '{column}' is '{label}': there is nothing to learn"
        yield Finding("error", "one_class", message, counts[label])
    rare = [label for label, count in counts.items() if count < _RARE]
    if several and rare and len(counts) > 1:
        examples = tuple(f"'{label}', {counts[label]} rows" for label in rare[:_EXAMPLES])
        message = f"{len(rare):,} labels in '{column}' have fewer than {_RARE} rows in {name}"
        yield Finding("info", "rare_labels", message, len(rare), examples)
