"""Rows of CSV, TSV, JSONL, plain-text and Parquet files and of saved datasets, streamed, each with its line."""

from __future__ import annotations

import csv
import difflib
import json
import re
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lexmill.data import saved
from lexmill.data.lines import MAX_LINE_BYTES, BadRow, Lines, check_encoding, megabytes, open_stream
from lexmill.errors import UserError

FORMATS = ("csv", "tsv", "jsonl", "txt", "parquet")
SAVED = "dataset"
"""The format of a directory that Hugging Face `datasets` saved; no file has it."""
SUFFIXES = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "txt", ".parquet": "parquet"}
COMPRESSED = (".gz", ".xz")
TEXT_COLUMN = "text"
"""The column of plain text, one text a line."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_EXAMPLES = 5


class Row(NamedTuple):
    """One row: the line it starts on, from 1 (Parquet, dataset: the number of the row), and values by column."""

    line: int
    values: dict[str, Any]


@dataclass
class Skipped:
    """Broken rows that were passed over: how many, and what was wrong with the first few."""

    count: int = 0
    messages: list[str] = field(default_factory=list[str])

    def add(self, bad: BadRow) -> None:
        self.count += 1
        if len(self.messages) < _EXAMPLES:
            self.messages.append(f"{bad.where}: {bad.message}")


@dataclass(frozen=True)
class Reading:
    """How a file is read; `open_source` documents the fields."""

    format: str
    encoding: str
    delimiter: str
    quotes: bool
    skip_bad: bool
    max_line_bytes: int


class Source:
    """A file of rows, or a saved dataset. Each iteration streams it anew; at most one row (Parquet, dataset: one batch)
    is in memory.

    Iterating raises `UserError` with `file:line` at a broken row, unless `skip_bad`, and where a file has no rows.

    Attributes:
        path: the file or directory.
        reading: how it is read.
        skipped: the broken rows that the latest iteration passed over.
    """

    def __init__(self, path: Path, reading: Reading) -> None:
        self.path = path
        self.reading = reading
        self.skipped = Skipped()

    def where(self, line: int) -> str:
        """`file:line`, as errors and reports name a row."""
        return f"{self.path}:{line}"

    def files(self) -> list[Path]:
        """The files whose bytes decide the rows."""
        return saved.files(self.path) if self.reading.format == SAVED else [self.path]

    def __iter__(self) -> Iterator[Row]:
        skipped = self.skipped = Skipped()
        rows = 0
        for item in self._items():
            if isinstance(item, Row):
                rows += 1
                yield item
            elif self.reading.skip_bad:
                skipped.add(item)
            else:
                raise item
        if not rows and skipped.count:
            raise UserError(f"all {skipped.count:,} rows are broken", where=str(self.path), hint=skipped.messages[0])
        if not rows:
            raise UserError("the file holds no rows", where=str(self.path), hint="at least one row is needed")

    def peek(self, count: int = 200) -> list[Row]:
        """The first rows."""
        with closing(iter(self)) as rows:  # pyright: ignore[reportArgumentType]  (a generator, which has `close`)
            return list(islice(rows, count))

    def columns(self) -> list[str]:
        """The names of the columns, in order; of JSONL those seen in the first rows."""
        return list(dict.fromkeys(name for row in self.peek() for name in row.values))

    def _items(self) -> Iterator[Row | BadRow]:
        reading = self.reading
        if reading.format == SAVED:
            yield from (Row(number, values) for number, values in enumerate(saved.rows(self.path), 1))
            return
        if reading.format == "parquet":
            yield from _parquet_rows(self.path)
            return
        with open_stream(self.path) as stream:
            lines = Lines(stream, str(self.path), encoding=reading.encoding, max_bytes=reading.max_line_bytes)
            if reading.format == "jsonl":
                yield from _json_rows(lines, lines)
            elif reading.format == "txt":
                yield from _text_rows(lines, lines)
            else:
                yield from _delimited_rows(lines, reading.delimiter, quotes=reading.quotes)


def open_source(
    path: str | Path,
    *,
    format: str | None = None,
    encoding: str = "utf-8",
    delimiter: str | None = None,
    quotes: bool = True,
    skip_bad: bool = False,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Source:
    """A file of rows, checked to exist and to be of a known format; its rows are read on iteration.

    Args:
        path: `.csv`, `.tsv`, `.jsonl`, `.txt` (each also `.gz`, `.xz`) or `.parquet`; or a directory as
            `save_to_disk` of Hugging Face `datasets` writes it, a split of several as `DIR/train`.
        format: one of `FORMATS`, where the suffix does not say it.
        encoding: of text; a byte order mark is dropped.
        delimiter: between columns; a comma for CSV, a tab for TSV.
        quotes: whether `"` quotes a column (RFC 4180); without, it is a character like others.
        skip_bad: pass over broken rows and count them in `Source.skipped`.
        max_line_bytes: a longer row is broken.
    """
    path = Path(path)
    if not path.exists():
        raise UserError("no such file", where=str(path), hint=_nearest_file(path))
    if path.is_dir():
        _check_saved(path, format)
        format = SAVED
    format = format or _format_of(path)
    if format not in FORMATS and not path.is_dir():
        raise UserError(f"unknown format '{format}'", where=str(path), hint=f"known formats: {', '.join(FORMATS)}")
    delimiter = delimiter or ("\t" if format == "tsv" else ",")
    if len(delimiter) != 1 or delimiter in '"\r\n\0':
        raise UserError(f"the delimiter {delimiter!r} is not one character", where="delimiter", hint="e.g. ';'")
    if path.is_file() and not path.stat().st_size:
        raise UserError("the file is empty", where=str(path), hint="at least one row is needed")
    return Source(path, Reading(format, check_encoding(encoding), delimiter, quotes, skip_bad, max_line_bytes))


def read_lines(
    stream: BinaryIO,
    *,
    format: str | None = None,
    name: str = "stdin",
    encoding: str = "utf-8",
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Iterator[Row]:
    """Rows of a stream that can be read once, such as standard input, each as soon as its line has come.

    Args:
        format: `jsonl` or `txt` (one text a line, as column `text`); by default JSONL where the first line that is
            not blank begins with `{`.
    """
    lines = Lines(stream, name, encoding=check_encoding(encoding), max_bytes=max_line_bytes)
    if format not in (None, "jsonl", "txt"):
        raise UserError(f"unknown format '{format}'", where=name, hint="a stream is jsonl or txt")
    items = iter(lines)
    first = next((item for item in items if isinstance(item, BadRow) or item.strip()), None)
    if first is None:
        return
    if format is None:
        format = "jsonl" if isinstance(first, str) and first.lstrip().startswith("{") else "txt"
    parse = _json_rows if format == "jsonl" else _text_rows
    for item in parse(lines, chain([first], items)):
        if isinstance(item, BadRow):
            raise item
        yield item


def _check_saved(path: Path, format: str | None) -> None:
    if format not in (None, SAVED):
        raise UserError(f"a directory is not '{format}'", where=str(path), hint="name one file inside it")
    if several := saved.splits(path):
        names = ", ".join(str(path / name) for name in several)
        raise UserError(f"holds {len(several)} splits", where=str(path), hint=f"name one: {names}")
    if not saved.is_saved(path):
        hint = "name one file inside it, or a directory that save_to_disk of datasets wrote"
        raise UserError("is a directory, not a file of rows", where=str(path), hint=hint)


def _nearest_file(path: Path) -> str:
    if several := saved.splits(path.parent):
        return f"the splits there are: {', '.join(several)}"
    if not path.parent.is_dir():
        return f"there is no directory {path.parent} either"
    names = [entry.name for entry in islice(path.parent.iterdir(), 1000)]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {path.parent / close[0]}?" if close else "check the path"


def _format_of(path: Path) -> str:
    plain = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    found = SUFFIXES.get(plain.suffix.lower())
    if found is None or (found == "parquet" and plain is not path):
        known = ", ".join(SUFFIXES)
        hint = f"known: {known}, text ones also with {' or '.join(COMPRESSED)}"
        raise UserError(f"unknown suffix '{path.suffix}'", where=str(path), hint=hint)
    return found


def _text_rows(lines: Lines, items: Iterator[str | BadRow] | Lines) -> Iterator[Row | BadRow]:
    for item in items:
        if isinstance(item, BadRow):
            yield item
        elif item.strip():
            yield Row(lines.number, {TEXT_COLUMN: item.rstrip("\r\n")})


def _json_rows(lines: Lines, items: Iterator[str | BadRow] | Lines) -> Iterator[Row | BadRow]:
    for item in items:
        if isinstance(item, BadRow):
            yield item
        elif item.strip():
            yield _json_row(item, lines.number, lines.where(lines.number))


def _json_row(text: str, line: int, where: str) -> Row | BadRow:
    hint = 'each line is one JSON object, as in {"text": "…", "label": "…"}'
    try:
        values = json.loads(text)
        if _SURROGATE.search(text):
            json.dumps(values, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        return BadRow(f"not JSON: {error.msg} at column {error.colno}", where=where, hint=hint)
    except UnicodeEncodeError:
        return BadRow("half of a surrogate pair (\\ud800 to \\udfff) is no text", where=where)
    except (ValueError, RecursionError) as error:
        return BadRow(f"JSON that cannot be held: {error}", where=where, hint=hint)
    if not isinstance(values, dict):
        kind = {"list": "a list", "str": "a string", "NoneType": "null"}.get(type(values).__name__, "a number")
        return BadRow(f"the line is {kind}, not an object", where=where, hint=hint)
    return Row(line, values)


class _Feed:
    """Gives `csv.reader` lines, and takes back those of a record that turned out broken."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._items = iter(lines)
        self._back: deque[tuple[int, str | BadRow]] = deque()
        self._record: list[tuple[int, str | BadRow]] = []
        self._size = 0

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        if self._back:
            number, item = self._back.popleft()
        else:
            item = next(self._items)
            number = self._lines.number
        self._record.append((number, item))
        if isinstance(item, BadRow):
            raise item
        self._size += len(item)
        if self._size > self._lines.max_bytes and len(self._record) > 1:
            raise csv.Error(f"a quote is not closed within {megabytes(self._lines.max_bytes)}")
        return item

    def begin(self) -> None:
        """A new record starts."""
        self._record.clear()
        self._size = 0

    @property
    def start(self) -> int:
        """The line that the record starts on."""
        return self._record[0][0]

    @property
    def spans(self) -> bool:
        return len(self._record) > 1

    def retry(self) -> None:
        """Read on after the first line of the record: what followed it may be whole."""
        self._back.extendleft(reversed(self._record[1:]))


def _delimited_rows(lines: Lines, delimiter: str, *, quotes: bool) -> Iterator[Row | BadRow]:
    if csv.field_size_limit() < lines.max_bytes:
        csv.field_size_limit(lines.max_bytes)  # the module has no limit per reader; ours holds before it
    feed = _Feed(lines)
    quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    reader = csv.reader(feed, delimiter=delimiter, strict=True, quoting=quoting)
    header: list[str] | None = None
    while True:
        feed.begin()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except (BadRow, csv.Error) as error:
            bad = _bad_record(error, feed, lines)
            if header is None:
                raise bad from error
            feed.retry()
            yield bad
            continue
        if not fields:
            continue
        if header is None:
            header = _header(fields, delimiter, lines.where(feed.start))
        elif len(fields) == len(header):
            yield Row(feed.start, dict(zip(header, fields, strict=True)))
        else:
            count = f"{len(fields)} column{'s' * (len(fields) > 1)}"
            message = f"{count} where the header has {len(header)} ({', '.join(header)})"
            hint = f"put a text that holds {delimiter!r}, a quote or a line end in double quotes"
            yield BadRow(message, where=lines.where(feed.start), hint=hint)


def _bad_record(error: BadRow | csv.Error, feed: _Feed, lines: Lines) -> BadRow:
    where = lines.where(feed.start)
    if isinstance(error, BadRow):
        if not feed.spans:
            return error
        return BadRow(f"a quoted column runs into a broken line ({error})", where=where, hint="close the quote")
    message = str(error)
    if "unexpected end of data" in message:
        message = "a quote that is opened in this row is never closed"
    elif "new-line character" in message:
        return BadRow("a line end of CR alone", where=where, hint="end lines with LF or CR LF")
    hint = 'write a quote inside a quoted column twice ("") or, where quotes mean nothing, switch them off'
    return BadRow(f"broken row: {message}", where=where, hint=hint)


def _header(fields: Sequence[str], delimiter: str, where: str) -> list[str]:
    names = [name.strip() for name in fields]
    for position, name in enumerate(names, 1):
        if not name:
            raise UserError(f"column {position} has no name", where=where, hint="the first line names every column")
        if name in names[: position - 1]:
            raise UserError(f"two columns are named '{name}'", where=where, hint="give each column its own name")
    other = next((mark for mark in "\t;|," if mark != delimiter and mark in names[0]), None)
    if len(names) == 1 and other:
        hint = f"part columns by commas, or by tabs in a .tsv file; `fit` takes --set data.delimiter={other!r} too"
        raise UserError(f"the header '{names[0]}' is one column that holds {other!r}", where=where, hint=hint)
    return names


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names: list[str] = file.schema_arrow.names
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise UserError(f"two columns are named '{twice}'", where=str(path))
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(number, values)
    except (pa.ArrowException, OSError) as error:
        message = f"not a Parquet file that can be read: {str(error).splitlines()[0]}"
        raise UserError(message, where=str(path), hint="write the file again") from error
