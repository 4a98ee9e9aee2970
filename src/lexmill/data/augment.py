"""More rows out of those there are: texts changed a little, by edits that keep their label (Wei and Zou 2019, EDA)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lexmill.errors import UserError

Edit = Literal["swap", "delete", "keyboard", "synonym"]
EDITS: tuple[Edit, ...] = ("swap", "delete", "keyboard", "synonym")
MARK = "augmented"
"""The column that says how a row was made; null in rows as they came."""
_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_SINGLE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Kana and Chinese characters, each of which is taken for a word."""
_PIECES = re.compile(rf"[{_SINGLE}]|[^\s{_SINGLE}]+|\s+")

Synonyms = Mapping[str, Sequence[str]]
Rewrite = Callable[[list[str]], list[str]]
"""Texts in, as many texts out, e.g. translated there and back."""


def read_synonyms(path: Path) -> Synonyms:
    """Groups of words that may stand for each other: one group a line, words parted by commas.

    Raises:
        UserError: for a file that cannot be read, and with `file:line` for a line of one word.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot be read: {error}", where=str(path), hint="one group of words a line, in UTF-8"
        ) from error
    found: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        words = [word.strip() for word in line.split(",") if word.strip()]
        if not words:
            continue
        if len(words) == 1:
            raise UserError(f"'{words[0]}' stands alone", where=f"{path}:{number}", hint="write: big, large, great")
        for word in words:
            others = found.setdefault(word.lower(), [])
            others += [other for other in words if other != word and other not in others]
    if not found:
        raise UserError("holds no words", where=str(path), hint="write groups such as: big, large, great")
    return found


@dataclass(frozen=True)
class Editor:
    """Changes texts by chance; what comes of one is a function of it, `seed` and where it stands alone.

    Args:
        edits: which; each copy takes one of them.
        share: of a text's words (Chinese and Japanese: characters) that an edit changes, at least one.
        synonyms: for the edit `synonym`.
        seed: another seed gives other copies.
    """

    edits: tuple[Edit, ...]
    share: float
    seed: int = 0
    synonyms: Synonyms | None = None

    def __post_init__(self) -> None:
        for edit in self.edits:
            if edit not in EDITS:
                raise UserError(f"unknown edit '{edit}'", where="--how", hint=f"known edits: {', '.join(EDITS)}")
        if "synonym" in self.edits and self.synonyms is None:
            raise UserError("synonyms need a file of words", where="--how", hint="give --synonyms FILE")
        if not 0 < self.share <= 1:
            raise UserError(f"{self.share} is no share", where="--share", hint="give more than 0, at most 1")

    def copy(self, text: str, row: int, number: int) -> tuple[str, Edit] | None:
        """Copy `number` of the text of row `row`, and the edit that made it; None where no edit changes it."""
        random = np.random.default_rng(np.random.SeedSequence((self.seed, row, number)))
        for edit in random.permutation(np.array(self.edits)).tolist():
            changed = self._apply(edit, text, random)
            if changed != text and changed.strip():
                return changed, edit
        return None

    def _apply(self, edit: Edit, text: str, random: np.random.Generator) -> str:
        pieces: list[str] = _PIECES.findall(text)
        words = [at for at, piece in enumerate(pieces) if not piece.isspace()]
        count = max(1, round(self.share * len(words)))
        if edit == "swap":
            return _swap(pieces, words, count, random)
        if edit == "delete":
            gone = (
                set(random.choice(words, min(count, len(words) - 1), replace=False).tolist()) if len(words) > 1 else ()
            )
            return re.sub(r"\s{2,}", " ", "".join(p for at, p in enumerate(pieces) if at not in gone)).strip()
        able = [at for at in words if self._replacements(edit, pieces[at])]
        for at in random.choice(able, min(count, len(able)), replace=False).tolist() if able else ():
            options = self._replacements(edit, pieces[at])
            pieces[at] = options[int(random.integers(len(options)))]
        return "".join(pieces)

    def _replacements(self, edit: Edit, word: str) -> list[str]:
        """What a word may become."""
        if edit == "synonym":
            assert self.synonyms is not None
            return list(self.synonyms.get(word.lower(), ()))
        if len(word) < 4 or not word.isascii():
            return []
        inner = range(1, len(word))
        return [word[:at] + key + word[at + 1 :] for at in inner for key in _neighbours(word[at])]


def _swap(pieces: list[str], words: Sequence[int], count: int, random: np.random.Generator) -> str:
    for _ in range(count if len(words) > 1 else 0):
        first = int(random.integers(len(words) - 1))
        one, other = words[first], words[first + 1]
        pieces[one], pieces[other] = pieces[other], pieces[one]
    return "".join(pieces)


def _neighbours(letter: str) -> list[str]:
    """The keys beside a letter on a QWERTY keyboard, in its case."""
    for row in _KEYS:
        at = row.find(letter.lower())
        if at >= 0:
            near = [row[i] for i in (at - 1, at + 1) if 0 <= i < len(row)]
            return [key.upper() if letter.isupper() else key for key in near]
    return []


def augment(rows: Iterable[Mapping[str, Any]], text: str, editor: Editor, copies: int) -> Iterator[dict[str, Any]]:
    """Each row, then its changed copies, as many as `copies` and as differ from it and from each other."""
    for index, row in enumerate(rows):
        yield {**row, MARK: None}
        seen = {row.get(text)}
        for number in range(copies if isinstance(row.get(text), str) else 0):
            made = editor.copy(row[text], index, number)
            if made is not None and made[0] not in seen:
                seen.add(made[0])
                yield {**row, text: made[0], MARK: made[1]}


def rewrite(
    rows: Iterable[Mapping[str, Any]], text: str, through: Rewrite, name: str, chunk: int = 256
) -> Iterator[dict[str, Any]]:
    """Each row, then one whose text `through` has put in other words, where it did.

    Args:
        name: what the column `augmented` says of these.
    """
    held: list[Mapping[str, Any]] = []
    for row in rows:
        held.append(row)
        if len(held) == chunk:
            yield from _rewritten(held, text, through, name)
            held = []
    yield from _rewritten(held, text, through, name)


def _rewritten(rows: Sequence[Mapping[str, Any]], text: str, through: Rewrite, name: str) -> Iterator[dict[str, Any]]:
    texts = [str(row.get(text) or "") for row in rows]
    filled = [at for at, one in enumerate(texts) if one.strip()]
    made = dict(zip(filled, through([texts[at] for at in filled]) if filled else [], strict=True))
    for at, row in enumerate(rows):
        yield {**row, MARK: None}
        new = made.get(at, "").strip()
        if new and new != texts[at].strip():
            yield {**row, text: new, MARK: name}
