"""A question with a long context as overlapping windows, and where each token stands in the raw context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from tokenizers import Encoding, Tokenizer

from lexmill.data.batch import Tokens
from lexmill.errors import UserError


@dataclass(frozen=True)
class Window:
    """One sequence: the question, and a piece of the context.

    Args:
        rows: the sequence's tokens that are of the context.
        spans: of each of them, its characters in the raw context, blanks at its ends left out.
        first: the place of the first of them among the tokens of the whole context.
    """

    tokens: Tokens
    rows: Int[np.ndarray, "piece"]
    spans: Int[np.ndarray, "piece 2"]
    first: int


def windows_of(
    pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer, max_length: int, stride: int
) -> list[list[Window]]:
    """Each (question, context) as windows of at most `max_length` tokens, as the tokenizer joins a pair.

    Args:
        stride: tokens of the context that a window shares with the one before.

    Raises:
        UserError: a question leaves no room for more of its context than `stride` tokens.
    """
    tokenizer.no_truncation()
    questions = tokenizer.encode_batch_fast([question for question, _ in pairs], add_special_tokens=False)
    special = tokenizer.num_special_tokens_to_add(is_pair=True)
    rooms = [max_length - special - len(one.ids) for one in questions]
    for (question, _), one, room in zip(pairs, questions, rooms, strict=True):
        if room <= stride:
            raise UserError(
                f"the question '{question[:60]}' of {len(one.ids)} tokens leaves {max(room, 0)} for its context",
                hint=f"at least {stride + 1} are needed: shorten it, raise max_length ({max_length}) or lower stride",
            )
    tokenizer.enable_truncation(max_length, stride=stride, strategy="only_second")
    try:
        encodings = tokenizer.encode_batch(list(pairs))
    finally:
        tokenizer.no_truncation()
    return [
        [_window(piece, context, i * (room - stride)) for i, piece in enumerate([whole, *whole.overflowing])]
        for (_, context), whole, room in zip(pairs, encodings, rooms, strict=True)
    ]


def _window(encoding: Encoding, context: str, first: int) -> Window:
    rows = [row for row, owner in enumerate(encoding.sequence_ids) if owner == 1]
    spans = np.array([_trimmed(context, *encoding.offsets[row]) for row in rows], np.int64).reshape(-1, 2)
    tokens = Tokens(np.array(encoding.ids, np.int64), np.array(encoding.type_ids, np.int64))
    return Window(tokens, np.array(rows, np.int64), spans, first)


def _trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end


def places_of(windows: Sequence[Window], start: int, end: int) -> list[tuple[int, int] | None]:
    """Per window, the rows of the first and the last token of the characters `start` to `end` of the context; None
    where it does not hold all of them.

    Raises:
        UserError: no token, or no window, holds these characters.
    """
    touched = [one.first + np.flatnonzero((one.spans[:, 1] > start) & (one.spans[:, 0] < end)) for one in windows]
    tokens = np.concatenate(touched)
    if not len(tokens):
        raise UserError(f"the tokenizer drops the answer at characters {start} to {end}", hint="leave the row out")
    low, high = int(tokens.min()), int(tokens.max())
    held = [one.first <= low and high < one.first + len(one.rows) for one in windows]
    if not any(held):
        hint = f"raise stride to at least {high - low + 1}, and max_length with it, or leave the row out"
        raise UserError(f"an answer of {high - low + 1} tokens stands in no window", hint=hint)
    return [
        (int(one.rows[low - one.first]), int(one.rows[high - one.first])) if there else None
        for one, there in zip(windows, held, strict=True)
    ]
