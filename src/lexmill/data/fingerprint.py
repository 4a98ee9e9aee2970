"""What data an artefact was made from, in a form that can be compared."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from lexmill.data.sources import Source
from lexmill.errors import UserError


def content_sha256(source: Source) -> str:
    """The sha256 of the file's bytes as stored, in hexadecimal; of several files, that of their hashes in order."""
    hashes = [_sha256(file) for file in source.files()]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", where=str(path)) from error


def data_fingerprint(source: Source, rows: int | None = None) -> dict[str, Any]:
    """What a manifest says of a file of rows: its name, rows, columns and the sha256 of its bytes; never its content.

    Args:
        rows: how many the file has, where it is known; otherwise they are counted.
    """
    return {
        "name": source.path.name,
        "format": source.reading.format,
        "rows": sum(1 for _ in source) if rows is None else rows,
        "columns": source.columns(),
        "sha256": content_sha256(source),
    }
