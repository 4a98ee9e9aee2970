"""The header of a safetensors file, checked without torch before any tensor is read.

Implements the format as specified in the safetensors README, "Format" (Hugging Face, 2022): eight bytes of header size,
little-endian, a JSON header, then the tensors' bytes without holes or overlaps.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from lexmill.errors import UserError

_MAX_HEADER = 100_000_000
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the header: `start` and `end` are byte positions in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file by name. Raises `UserError` naming the file where it is truncated, has bytes
    that belong to no tensor or to two, or is not a safetensors file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8 or length > _MAX_HEADER:
                raise _broken(path, "truncated, or not a safetensors file")
            header = file.read(length)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from error
    try:
        raw = json.loads(header, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise _broken(path, "its header is not a table of tensors")
    tensors = cast("dict[str, Any]", raw)
    entries = {name: _entry(path, name, value, 8 + length) for name, value in tensors.items() if name != "__metadata__"}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            raise _broken(path, f"tensor '{name}' {'overlaps another' if entry.start < end else 'follows a hole'}")
        end = entry.end
    if end != size:
        raise _broken(path, f"{size} bytes long where its header says {end}")
    return entries


def _entry(path: Path, name: str, value: Any, base: int) -> TensorEntry:
    match value:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(start), int(end)]} if dtype in _BITS:
            sizes = tuple(size for size in shape if type(size) is int and size >= 0)
            if len(sizes) == len(shape) and (end - start) * 8 == math.prod(sizes) * _BITS[dtype]:
                return TensorEntry(dtype, sizes, base + start, base + end)
        case _:
            pass
    raise _broken(path, f"its header describes tensor '{name}' wrongly")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _broken(path: Path, what: str) -> UserError:
    return UserError(what, where=str(path), hint="copy or download the file again")
