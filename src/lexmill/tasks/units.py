"""What is labelled in a text: words, signs, and single characters of scripts without blanks; where each one stands."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from jaxtyping import Int

Spans = Int[np.ndarray, "unit 2"]

_CHARACTERS = (
    (0x3005, 0x3007),
    (0x3041, 0x30FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x323AF),
)
"""Ideographs and kana (Unicode 16, blocks)."""


def units_of(text: str) -> Spans:
    """The units of a text in order, as characters `start` to `end`: runs of letters and digits, and by itself each sign
    and each Chinese or Japanese character. A combining mark belongs to what stands before it; blanks to nothing."""
    found: list[tuple[int, int]] = []
    last: str = "blank"
    for at, character in enumerate(text):
        kind = _kind(character)
        joins = last == "word" if kind == "word" else kind == "mark" and last != "blank"
        if joins:
            found[-1] = (found[-1][0], at + 1)
        elif kind != "blank":
            found.append((at, at + 1))
        if not (joins and kind == "mark"):
            last = "word" if kind == "mark" else kind
    return np.array(found, np.int64).reshape(-1, 2)


def is_by_character(tokens: Sequence[str]) -> bool:
    """Whether a row is given by characters: it holds Chinese or Japanese ones, and most of its tokens are of one."""
    single = sum(len(token) == 1 for token in tokens)
    return 2 * single > len(tokens) and any(_wide(character) for token in tokens for character in token)


def stripped(text: str, spans: Spans) -> Spans:
    """Spans without the blanks at their ends; those of nothing else are left out."""
    parts = [(text[start:end], start, end) for start, end in spans.tolist()]
    found = [(end - len(part.lstrip()), start + len(part.rstrip())) for part, start, end in parts if part.strip()]
    return np.array(found, np.int64).reshape(-1, 2)


def join(tokens: Sequence[str]) -> tuple[str, Spans]:
    """Given tokens as one text, and where each stands in it.

    A blank parts them, but not where one of the two is a Chinese or Japanese character or sign at that place; nor, in a
    row given by characters, two single ones (`C`, `S`, `O`, `L` within Chinese).
    """
    single = [len(token) == 1 for token in tokens]
    by_character = is_by_character(tokens)
    parts: list[str] = []
    spans: list[tuple[int, int]] = []
    length = 0
    for i, token in enumerate(tokens):
        if i and not (_wide(tokens[i - 1][-1:]) or _wide(token[:1]) or (by_character and single[i - 1] and single[i])):
            parts.append(" ")
            length += 1
        spans.append((length, length + len(token)))
        parts.append(token)
        length += len(token)
    return "".join(parts), np.array(spans, np.int64).reshape(-1, 2)


@lru_cache(maxsize=65_536)
def _kind(character: str) -> Literal["blank", "mark", "word", "alone"]:
    category = unicodedata.category(character)
    if character.isspace() or category in ("Cc", "Zs", "Zl", "Zp"):
        return "blank"
    if category[0] == "M" or category == "Cf":
        return "mark"
    return "alone" if category[0] in "PS" or _ideograph(character) else "word"


def _ideograph(character: str) -> bool:
    return any(first <= ord(character) <= last for first, last in _CHARACTERS)


@lru_cache(maxsize=65_536)
def _wide(character: str) -> bool:
    """Whether no blank parts this character from its neighbours: ideographs, kana, and their full-width signs."""
    return bool(character) and (
        _ideograph(character) or 0x3000 <= ord(character) <= 0x303F or 0xFF00 <= ord(character) <= 0xFF65
    )
