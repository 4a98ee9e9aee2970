"""How near written texts are to references: BLEU and chrF by `sacrebleu`, ROUGE by `rouge-score`; all from 0 to 100.

Intervals come from resampled items. Every metric sees the same resamples, so that they can be compared.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from lexmill.errors import MissingExtra
from lexmill.metrics.intervals import Interval, percentiles

BleuTokenizer = Literal["auto", "13a", "intl", "zh", "char", "none"]
Measured = tuple[float, Interval]
_ROUGE = ("rouge1", "rouge2", "rougeL")


def bleu_tokenizer(references: Sequence[Sequence[str]], wanted: BleuTokenizer) -> str:
    """What `sacrebleu` is to split by: for `auto` Chinese characters where they are most of the letters, else `13a`."""
    if wanted != "auto":
        return wanted
    letters = [c for texts in references[:1000] for text in texts for c in text if c.isalpha()]
    return "zh" if sum(map(_is_cjk, letters)) > len(letters) / 2 else "13a"


def text_metrics(
    texts: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenizer: BleuTokenizer = "auto",
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Measured]:
    """`bleu`, `chrf`, `rouge1`, `rouge2` and `rougeL` of texts, each with its 95 % interval.

    BLEU (Papineni et al. 2002) and chrF (Popović 2015) are of the whole corpus; ROUGE (Lin 2004) is the mean F1 of the
    texts, each against its best reference.

    Args:
        references: of each text, one or more.

    Raises:
        MissingExtra: the extra `seq2seq` is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError:
        raise MissingExtra("seq2seq", "BLEU, chrF and ROUGE") from None
    weights = np.random.default_rng(seed).multinomial(len(texts), [1 / len(texts)] * len(texts), resamples)
    found = {
        "bleu": _corpus(BLEU(tokenize=bleu_tokenizer(references, tokenizer), force=True), texts, references, weights),
        "chrf": _corpus(CHRF(), texts, references, weights),
    }
    scorer = RougeScorer(_ROUGE, use_stemmer=False, tokenizer=_Words())
    each = [scorer.score_multi(list(targets), text) for text, targets in zip(texts, references, strict=True)]
    for name in _ROUGE:
        f1 = np.array([100 * one[name].fmeasure for one in each])
        found[name] = float(f1.mean()), percentiles(weights @ f1 / len(f1), 0.95)
    return found


def _corpus(
    metric: Any, texts: Sequence[str], references: Sequence[Sequence[str]], weights: Float[np.ndarray, "resample item"]
) -> Measured:
    """A metric that is computed from sums over the items, and its interval from weighted sums."""
    streams = [[r[i] if i < len(r) else None for r in references] for i in range(max(map(len, references)))]
    stats = np.array(metric._extract_corpus_statistics(texts, streams), dtype=np.int64)

    def score(sums: np.ndarray) -> float:
        return float(metric._compute_score_from_stats(sums.tolist()).score)

    return score(stats.sum(0)), percentiles(np.array([score(sums) for sums in weights @ stats]), 0.95)


class _Words:
    """Splits into lower-cased words, in any script, and into single Chinese characters."""

    def tokenize(self, text: str) -> list[str]:
        spaced = "".join(f" {c} " if _is_cjk(c) else c if c.isalnum() else " " for c in text.lower())
        return spaced.split()


def _is_cjk(character: str) -> bool:
    return unicodedata.name(character, "").startswith("CJK UNIFIED")
