"""Long texts as overlapping windows: a question with its context, or one text cut into units beforehand; and where
each token stands in the raw text."""

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


@dataclass(frozen=True)
class UnitWindow:
    """One sequence: a piece of a text.

    Args:
        units: the units that this window answers for, in order: those that have the most context in it.
        rows: the first token of each of them.
    """

    tokens: Tokens
    units: Int[np.ndarray, "unit"]
    rows: Int[np.ndarray, "unit"]


def windows_of_units(
    texts: Sequence[Sequence[str]], tokenizer: Tokenizer, max_length: int, stride: int
) -> list[list[UnitWindow]]:
    """Each text, given by its units, as windows of at most `max_length` tokens. A unit that the tokenizer drops stands
    in none of them.

    Args:
        stride: tokens that a window shares with the one before.

    Raises:
        UserError: a window has no room for more than `stride` tokens.
    """
    room = max_length - tokenizer.num_special_tokens_to_add(is_pair=False)
    if room <= stride:
        raise UserError(
            f"windows of {max_length} tokens, special ones included, cannot share {stride}",
            where="options.stride",
            hint=f"raise max_length or lower stride to at most {max(room - 1, 0)}",
        )
    tokenizer.enable_truncation(max_length, stride=stride)
    try:
        encodings = tokenizer.encode_batch([list(units) for units in texts], is_pretokenized=True)
    finally:
        tokenizer.no_truncation()
    return [_unit_windows([whole, *whole.overflowing], room - stride) for whole in encodings]


def _unit_windows(pieces: Sequence[Encoding], step: int) -> list[UnitWindow]:
    begins: dict[int, int] = {}  # the place of a unit's first token among those of the whole text
    best: dict[int, tuple[int, int, int]] = {}  # how much context a unit has, in which window, at which row
    for index, piece in enumerate(pieces):
        held = [(row, unit) for row, unit in enumerate(piece.word_ids) if unit is not None]
        for place, (row, unit) in enumerate(held):
            if begins.setdefault(unit, index * step + place) == index * step + place:
                context = min(place, len(held) - 1 - place)
                if unit not in best or context > best[unit][0]:
                    best[unit] = (context, index, row)
    found: list[UnitWindow] = []
    for index, piece in enumerate(pieces):
        own = sorted((unit, row) for unit, (_, window, row) in best.items() if window == index)
        tokens = Tokens(np.array(piece.ids, np.int64), np.array(piece.type_ids, np.int64))
        units, rows = np.array(own, np.int64).reshape(-1, 2).T
        found.append(UnitWindow(tokens, units, rows))
    return found


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
    where it does not hold all of them, which may be so of every window."""
    touched = [one.first + np.flatnonzero((one.spans[:, 1] > start) & (one.spans[:, 0] < end)) for one in windows]
    tokens = np.concatenate(touched)
    if not len(tokens):
        return [None for _ in windows]
    low, high = int(tokens.min()), int(tokens.max())
    held = [one.first <= low and high < one.first + len(one.rows) for one in windows]
    return [
        (int(one.rows[low - one.first]), int(one.rows[high - one.first])) if there else None
        for one, there in zip(windows, held, strict=True)
    ]
