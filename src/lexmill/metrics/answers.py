"""How near short answers are to references: exact match and F1, each against the best reference, from 0 to 1.

English by the rules of SQuAD 1.1 (Rajpurkar et al. 2016), Chinese by those of CMRC 2018 (Cui et al. 2019).
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)


def mostly_chinese(texts: Sequence[str]) -> bool:
    """Whether most letters of these texts are Chinese characters."""
    letters = [c for text in texts for c in text if c.isalpha()]
    return sum(map(_is_cjk, letters)) > len(letters) / 2


def english_tokens(text: str) -> list[str]:
    """Lower-cased words without ASCII punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_ASCII_PUNCTUATION)).split()


def mixed_tokens(text: str) -> list[str]:
    """Chinese characters singly, others as lower-cased words; punctuation and symbols are left out."""
    kept = (c for c in text.lower() if unicodedata.category(c)[0] not in "PS")
    return "".join(f" {c} " if _is_cjk(c) else c for c in kept).split()


def answer_scores(answer: str, references: Sequence[str], *, chinese: bool) -> tuple[float, float]:
    """Exact match and F1 of an answer. No reference, or only empty ones, means that an empty answer is right.

    F1 counts words in common for English, and for Chinese the longest run of tokens in common.
    """
    tokens, common = (mixed_tokens, _longest_run) if chinese else (english_tokens, _shared)
    given = tokens(answer)
    exact = f1 = 0.0
    for reference in references or ("",):
        wanted = tokens(reference)
        same = float(given == wanted)
        exact = max(exact, same)
        f1 = max(f1, 2 * common(given, wanted) / (len(given) + len(wanted)) if given and wanted else same)
    return exact, f1


def _shared(a: Sequence[str], b: Sequence[str]) -> int:
    return (Counter(a) & Counter(b)).total()


def _longest_run(a: Sequence[str], b: Sequence[str]) -> int:
    return SequenceMatcher(None, a, b, autojunk=False).find_longest_match().size


def _is_cjk(character: str) -> bool:
    return unicodedata.name(character, "").startswith("CJK UNIFIED")
