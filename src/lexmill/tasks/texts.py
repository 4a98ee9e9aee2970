"""Columns of records as text and numbers, and texts as tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from lexmill.data.batch import Tokens
from lexmill.errors import UserError


def text_in(record: Mapping[str, Any], column: str) -> str:
    """The text of a column; a number is written out. A record without one is a `UserError`."""
    value = record.get(column)
    if value is None:
        what = f"'{column}' of a record is null" if column in record else f"a record has no '{column}'"
        raise UserError(what, hint=f"it has: {', '.join(name for name, one in record.items() if one is not None)}")
    return value if isinstance(value, str) else str(value)


def number_in(record: Mapping[str, Any], column: str) -> float | None:
    """The number of a column, given as one or written out; None where the cell is empty. Else a `UserError`."""
    value = record.get(column)
    if value is None or value == "":
        return None
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"{value!r} of column '{column}' is not a number", hint="name another column, or leave it out")
    return found


def tokens_of(
    texts: Sequence[str | tuple[str, str]], tokenizer: Tokenizer, max_length: int, *, typed: bool
) -> list[Tokens]:
    """Each text, or pair as one sequence, cut to `max_length` tokens, special ones included.

    Args:
        typed: keep segment ids, as pairs need.
    """
    tokenizer.enable_truncation(max_length)
    encodings = tokenizer.encode_batch_fast(list(texts))
    return [
        Tokens(np.array(one.ids, np.int64), np.array(one.type_ids, np.int64) if typed else None) for one in encodings
    ]
