"""Rows of files: formats, lines, and a clear error for everything that can be wrong with them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lexmill.data.sources import Row, open_source, read_lines
from lexmill.errors import UserError

CSV = b'text,label\nhello,a\n"two\nlines",b\nlast,c\n'


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def failure(path: Path, **options: object) -> UserError:
    with pytest.raises(UserError) as caught:
        list(open_source(path, **options))
    return caught.value


def test_csv_rows_carry_the_physical_line_they_start_on(tmp_path: Path) -> None:
    rows = list(open_source(write(tmp_path / "a.csv", CSV)))
    assert rows == [
        Row(2, {"text": "hello", "label": "a"}),
        Row(3, {"text": "two\nlines", "label": "b"}),
        Row(5, {"text": "last", "label": "c"}),
    ]


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_compressed_files_read_like_plain_ones(tmp_path: Path, pack: object) -> None:
    suffix = ".gz" if pack is gzip.compress else ".xz"
    plain = list(open_source(write(tmp_path / "a.csv", CSV)))
    assert list(open_source(write(tmp_path / f"a.csv{suffix}", pack(CSV)))) == plain


def test_a_source_can_be_iterated_again_and_peeked(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "a.csv", CSV))
    assert list(source) == list(source)
    assert [row.line for row in source.peek(2)] == [2, 3]
    assert source.columns() == ["text", "label"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "gb18030", "cp500"])
def test_text_in_a_named_encoding_is_read_without_its_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    text = "text,label\r\ncaf\u00e9,a\r\nplain,b\r\n" if encoding == "cp500" else "text,label\r\n很快,a\r\nplain,b\r\n"
    rows = list(open_source(write(tmp_path / "a.csv", text.encode(encoding)), encoding=encoding))
    assert [row.values["label"] for row in rows] == ["a", "b"]
    assert list(rows[0].values) == ["text", "label"]
    assert [row.line for row in rows] == [2, 3]


def test_tsv_and_other_delimiters(tmp_path: Path) -> None:
    assert next(iter(open_source(write(tmp_path / "a.tsv", b"text\tlabel\na, b\tx\n")))).values["text"] == "a, b"
    source = open_source(write(tmp_path / "a.csv", b"text;label\na, b;x\n"), delimiter=";")
    assert next(iter(source)).values == {"text": "a, b", "label": "x"}


def test_quotes_can_mean_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", b'text\tlabel\n"Yes" she said\tx\n')
    assert failure(path).where == f"{path}:2"
    assert next(iter(open_source(path, quotes=False))).values["text"] == '"Yes" she said'


def test_jsonl_and_text_ignore_blank_lines_but_count_them(tmp_path: Path) -> None:
    rows = list(open_source(write(tmp_path / "a.jsonl", b'{"text": "a"}\n\n  \r\n{"text": "b", "n": [1]}\n')))
    assert rows == [Row(1, {"text": "a"}), Row(4, {"text": "b", "n": [1]})]
    assert list(open_source(write(tmp_path / "a.txt", b"one\r\n\ntwo"))) == [
        Row(1, {"text": "one"}),
        Row(3, {"text": "two"}),
    ]


def test_parquet_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b"], "labels": [["x"], []]}), tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet")
    assert list(source) == [Row(1, {"text": "a", "labels": ["x"]}), Row(2, {"text": "b", "labels": []})]


def test_a_big_file_is_streamed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        for _ in range(20_000):
            file.write(json.dumps({"text": "x" * 1000}) + "\n")
    tracemalloc.start()
    assert sum(1 for _ in open_source(path)) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


CELLS = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=8))
def test_csv_written_by_python_is_read_back_with_true_lines(tmp_path: Path, cells: list[tuple[str, str]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_ALL)
    starts: list[int] = []
    for row in [("a", "b"), *cells]:
        starts.append(text.getvalue().count("\n") + 1)
        writer.writerow(row)
    rows = list(open_source(write(tmp_path / "a.csv", text.getvalue().encode())))
    assert [(row.line, *row.values.values()) for row in rows] == [
        (line, *row) for line, row in zip(starts[1:], cells, strict=True)
    ]


BROKEN = {
    "nul.csv": (b"text,label\na,b\nx\0y,b\n", 3, "NUL byte at byte 16", "utf-16"),
    "latin.csv": (b"text,label\nok,b\ncaf\xe9,b\n", 3, "byte 0xe9 at byte 19 of the file is not utf-8", "--encoding"),
    "wide.csv": ("text,label\na,b".encode("utf-16"), 1, "NUL byte", "--encoding utf-16"),
    "many.csv": (b"text,label\na,b,c\n", 2, "3 columns where the header has 2", "double quotes"),
    "few.csv": (b"text,label\n\"a\nb\"\n", 2, "1 column where the header has 2 (text, label)", "double quotes"),
    "open.csv": (b'text,label\na,b\n"c,d\ne,f\n', 3, "never closed", "twice"),
    "after.csv": (b'text,label\n"a" b,c\n', 2, "broken row", "twice"),
    "mac.csv": (b"text,label\ra,b\r", 1, "CR alone", "LF"),
    "twice.csv": (b"text,text\na,b\n", 1, "two columns are named 'text'", "own name"),
    "unnamed.csv": (b"text,\na,b\n", 1, "column 2 has no name", "names every column"),
    "semicolon.csv": (b"text;label\na;b\n", 1, "one column that holds ';'", "data.delimiter=';'"),
    "torn.jsonl": (b'{"text": "a"}\n{"text": \n', 2, "not JSON", "one JSON object"),
    "list.jsonl": (b'[1, 2]\n', 1, "the line is a list, not an object", "one JSON object"),
    "deep.jsonl": (b"[" * 200_000 + b"\n", 1, "JSON", "one JSON object"),
    "half.jsonl": (b'{"text": "\\ud83d"}\n', 1, "surrogate", None),
    "digits.jsonl": (b'{"a": ' + b"9" * 5000 + b"}\n", 1, "JSON", "one JSON object"),
    "long.jsonl": (b'{"text": "' + b"x" * 3_200_000 + b'"}\n', 1, "a line of 3.2 MB", "one line"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_an_error_with_its_place(tmp_path: Path, name: str) -> None:
    content, line, message, hint = BROKEN[name]
    path = write(tmp_path / name, content)
    error = failure(path)
    assert error.where == f"{path}:{line}"
    assert message in error.message
    assert (hint or "") in (error.hint or "")


def test_a_quote_left_open_in_a_big_file_is_found_within_the_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'text,label\n"a,b\n' + b"word word,c\n" * 300_000)
    error = failure(path)
    assert error.where == f"{path}:2"
    assert "not closed within 1.0 MB" in error.message


def test_broken_rows_can_be_skipped_and_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", b'text,label\na,1\n"b" b,2\nc,3\nd,4,5\ncaf\xe9,5\n"e,6\nf\xff,7\ng,8\nh,"9"\n')
    source = open_source(path, skip_bad=True)
    assert [row.values["text"] for row in source] == ["a", "c", "g", "h"]
    assert source.skipped.count == 5
    assert [message.split(": ")[0] for message in source.skipped.messages] == [f"{path}:{n}" for n in (3, 5, 6, 7, 8)]
    assert len(list(source)) == 4
    assert source.skipped.count == 5


def test_reading_goes_on_after_a_long_line_that_is_skipped(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "a.txt", b"a\n" + b"x" * 5000 + b"\nb\n"), skip_bad=True, max_line_bytes=100)
    assert list(source) == [Row(1, {"text": "a"}), Row(3, {"text": "b"})]
    assert "a line of 5,001 bytes" in source.skipped.messages[0]


def test_a_file_of_broken_rows_only_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    error = failure(write(tmp_path / "a.jsonl", b"[]\n[]\n"), skip_bad=True)
    assert "all 2 rows are broken" in error.message


def test_a_file_without_rows_is_an_error(tmp_path: Path) -> None:
    assert "empty" in failure(write(tmp_path / "a.csv", b"")).message
    assert "no rows" in failure(write(tmp_path / "b.csv", b"text,label\n")).message
    assert "no rows" in failure(write(tmp_path / "c.jsonl", b"\n\n")).message


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    write(tmp_path / "tickets.csv", CSV)
    error = failure(tmp_path / "ticket.csv")
    assert "tickets.csv" in (error.hint or "")
    assert "no directory" in (failure(tmp_path / "nowhere" / "a.csv").hint or "")


def test_a_directory_and_an_unknown_suffix_are_errors(tmp_path: Path) -> None:
    assert "directory" in failure(tmp_path).message
    error = failure(write(tmp_path / "a.xlsx", b"PK"))
    assert "unknown suffix '.xlsx'" in error.message
    assert ".jsonl" in (error.hint or "")
    assert "unknown format" in failure(write(tmp_path / "a.csv", CSV), format="excel").message


def test_an_unknown_encoding_and_a_long_delimiter_are_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", CSV)
    assert failure(path, encoding="utf-9").where == "--encoding"
    assert failure(path, encoding="hex").where == "--encoding"
    assert failure(path, delimiter="||").where == "delimiter"


def test_a_cut_off_or_false_compressed_file_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    data = b"".join(f'{{"text": "{n * n}"}}\n'.encode() for n in range(5000))
    for suffix, packed in ((".gz", gzip.compress(data)), (".xz", lzma.compress(data))):
        error = failure(write(tmp_path / f"a.jsonl{suffix}", packed[: len(packed) // 2]), skip_bad=True)
        assert "cut off" in error.message
        assert "cannot be read" in failure(write(tmp_path / f"b.jsonl{suffix}", data)).message


def test_a_broken_parquet_file_is_an_error(tmp_path: Path) -> None:
    assert "Parquet" in failure(write(tmp_path / "a.parquet", b"PAR1 and then nonsense")).message
    pq.write_table(pa.table({"text": ["a"] * 1000}), tmp_path / "b.parquet")
    whole = (tmp_path / "b.parquet").read_bytes()
    assert "Parquet" in failure(write(tmp_path / "c.parquet", whole[:-20])).message


def test_a_stream_is_jsonl_or_text_by_its_first_line() -> None:
    assert list(read_lines(io.BytesIO(b'\n{"text": "a"}\n'))) == [Row(2, {"text": "a"})]
    assert list(read_lines(io.BytesIO(b"hello\nyou"))) == [Row(1, {"text": "hello"}), Row(2, {"text": "you"})]
    assert list(read_lines(io.BytesIO(b"{hello\n"), format="txt")) == [Row(1, {"text": "{hello"})]
    assert list(read_lines(io.BytesIO(b""))) == []
    with pytest.raises(UserError, match="stdin:2: not JSON"):
        list(read_lines(io.BytesIO(b'{"text": "a"}\n{')))


def test_a_stream_gives_each_row_as_soon_as_its_line_has_come() -> None:
    import os

    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as stream, os.fdopen(writing, "wb", buffering=0) as pipe:
        rows = read_lines(stream)
        pipe.write(b"one\n")
        assert next(rows).values == {"text": "one"}
        pipe.write(b"two\n")
        assert next(rows).values == {"text": "two"}
