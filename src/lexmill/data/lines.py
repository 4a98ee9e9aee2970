"""Physical lines of a byte stream, decoded, each with its number; what is wrong with a line is said with its place."""

from __future__ import annotations

import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from lexmill.errors import UserError

MAX_LINE_BYTES = 1 << 20
"""The default limit on one row, in bytes."""

UNREADABLE = (EOFError, OSError, zlib.error, lzma.LZMAError)
"""What a stream raises that is cut off, damaged, or not of the format its suffix names."""


class BadRow(UserError):
    """One row is broken; the rows after it can still be read."""


def open_stream(path: Path) -> BinaryIO:
    """The bytes of a file, decompressed as its suffix says (`.gz`, `.xz`)."""
    try:
        if path.suffix.lower() == ".gz":
            return cast(BinaryIO, gzip.open(path, "rb"))
        if path.suffix.lower() == ".xz":
            return cast(BinaryIO, lzma.open(path, "rb"))
        return path.open("rb")
    except OSError as error:
        raise UserError(f"cannot be opened: {error.strerror or error}", where=str(path)) from error


def check_encoding(encoding: str) -> str:
    """The encoding's canonical name, or a `UserError` where Python knows no such text encoding."""
    try:
        "\n".encode(encoding)
        return codecs.lookup(encoding).name
    except (LookupError, UnicodeError) as error:
        hint = "for example utf-8, utf-16, gb18030, big5, shift_jis, cp1252, latin-1"
        raise UserError(f"unknown text encoding '{encoding}'", where="--encoding", hint=hint) from error


class _AsUtf8(io.RawIOBase):
    """A stream in an encoding whose line end is more than the byte 0x0A (UTF-16, UTF-32, EBCDIC), as UTF-8."""

    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._left = b""
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object, /) -> int:
        view = memoryview(cast(bytearray, buffer))
        while not self._left and not self._ended:
            raw = self._stream.read(io.DEFAULT_BUFFER_SIZE)
            self._ended = not raw
            self._left = self._decoder.decode(raw, final=self._ended).encode()
        count = min(len(view), len(self._left))
        view[:count] = self._left[:count]
        self._left = self._left[count:]
        return count


class Lines:
    """Iterates the lines of `stream`, line ends kept; a line that is broken comes as a `BadRow` in its place.

    At most `max_bytes` of a line are held in memory. A stream that cannot be read on raises `UserError`.

    Args:
        name: what the stream is called in errors.
        encoding: a name that passed `check_encoding`.

    Attributes:
        number: of the line that came last, from 1.
    """

    def __init__(self, stream: BinaryIO, name: str, *, encoding: str, max_bytes: int = MAX_LINE_BYTES) -> None:
        self.name = name
        self.number = 0
        self.max_bytes = max_bytes
        self._offset = 0
        self._encoding = encoding
        self._codec = encoding
        self._stream: BinaryIO | io.BufferedReader = stream
        if "\n".encode(encoding) != b"\n":
            self._stream = io.BufferedReader(_AsUtf8(stream, encoding))
            self._codec = "utf-8"

    def where(self, number: int) -> str:
        return f"{self.name}:{number}"

    def __iter__(self) -> Iterator[str | BadRow]:
        while raw := self._read():
            start, self._offset = self._offset, self._offset + len(raw)
            self.number += 1
            yield self._decode(raw, start)

    def _read(self) -> bytes:
        place = self.where(self.number + 1)
        try:
            return self._stream.readline(self.max_bytes + 1)
        except UnicodeDecodeError as error:
            message = f"bytes that are not {self._encoding}, on this line or one soon after: {error.reason}"
            raise UserError(message, where=place, hint="name the file's encoding with --encoding") from error
        except EOFError as error:
            hint = "copy or download the file again"
            raise UserError("the compressed file is cut off", where=place, hint=hint) from error
        except UNREADABLE as error:
            hint = "the file is damaged, or its suffix is not true"
            raise UserError(f"cannot be read: {error}", where=place, hint=hint) from error

    def _decode(self, raw: bytes, start: int) -> str | BadRow:
        place = self.where(self.number)
        at = raw.find(b"\0")
        if at >= 0:
            self._skip_rest(raw)
            hint = "a binary file, or text in another encoding: try --encoding utf-16"
            return BadRow(f"a NUL byte at byte {start + at} of the file", where=place, hint=hint)
        if len(raw) > self.max_bytes:
            size = len(raw) + self._skip_rest(raw)
            hint = f"the limit is {megabytes(self.max_bytes)}; a row is one line, rows do not share a line"
            return BadRow(f"a line of {megabytes(size)}; is the format right?", where=place, hint=hint)
        try:
            text = raw.decode(self._codec)
        except UnicodeDecodeError as error:
            wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            return BadRow(
                f"byte 0x{raw[error.start]:02x} at byte {start + error.start} of the file is not {self._encoding}",
                where=place,
                hint=f"name the file's encoding, e.g. --encoding {'utf-16' if wide else 'gb18030 or cp1252'}",
            )
        return text.removeprefix("\ufeff") if self.number == 1 else text

    def _skip_rest(self, raw: bytes) -> int:
        """Read on to the end of a line whose beginning is `raw`; returns how many bytes that took."""
        skipped = 0
        while not raw.endswith(b"\n"):
            try:
                raw = self._stream.readline(MAX_LINE_BYTES)
            except (UnicodeDecodeError, *UNREADABLE):
                break  # the next line's read meets the same fault and reports it
            if not raw:
                break
            skipped += len(raw)
        self._offset += skipped
        return skipped


def megabytes(size: int) -> str:
    """A size for people."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size:,} bytes"
