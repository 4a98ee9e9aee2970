"""What is hidden of a text for a model to find: single tokens, whole words, or spans. Functions of keys alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, UInt64

from lexmill.data.draws import keys, uniform

_MASKED, _RANDOM = 0.8, 0.1
"""Shares of the chosen tokens that the mask token and a random one stand in for; the rest is shown as it is."""


@dataclass(frozen=True)
class Masking:
    """How tokens are hidden (Devlin et al. 2019).

    Args:
        mask_id: the mask token.
        vocab_size: random tokens are ids below it.
        special: ids that are never chosen.
        share: of the other tokens that are chosen.
    """

    mask_id: int
    vocab_size: int
    special: tuple[int, ...]
    share: float = 0.15

    def hide(
        self,
        ids: Int[np.ndarray, "tok"],
        token_keys: UInt64[np.ndarray, "tok"],
        starts: Bool[np.ndarray, "tok"] | None = None,
    ) -> tuple[Int[np.ndarray, "tok"], Bool[np.ndarray, "tok"]]:
        """The tokens as a model is shown them, and which were chosen. Of the chosen, 80 % are shown as the mask token,
        10 % as a random one, 10 % as they are.

        Args:
            token_keys: one a token; equal keys are chosen alike.
            starts: whether a token begins a word, where words are chosen whole (Cui et al. 2021).
        """
        of_choice = token_keys if starts is None else token_keys[_word_of(starts)]
        chosen = (uniform(of_choice, 0) < self.share) & ~np.isin(ids, self.special)
        how = uniform(token_keys, 1)
        anything = (uniform(token_keys, 2) * self.vocab_size).astype(np.int64)
        replaced = np.where(how < _MASKED, self.mask_id, np.where(how < _MASKED + _RANDOM, anything, ids))
        return np.where(chosen, replaced, ids), chosen


def _word_of(starts: Bool[np.ndarray, "tok"]) -> Int[np.ndarray, "tok"]:
    """The token that begins each token's word."""
    places = np.where(starts, np.arange(len(starts)), 0)
    return np.maximum.accumulate(places)


def corrupt_spans(
    ids: Int[np.ndarray, "tok"],
    key: int,
    sentinels: Sequence[int],
    end_id: int,
    *,
    share: float = 0.15,
    mean_span: float = 3.0,
) -> tuple[Int[np.ndarray, "source"], Int[np.ndarray, "target"]]:
    """A text with spans taken out, and the spans (Raffel et al. 2020, T5).

    In the source each span gives way to a sentinel of its own; in the target the sentinels come in the same order, each
    with the tokens it stands for. Both end with `end_id`. A text of one token loses it.

    Args:
        ids: without special tokens; at least one.
        key: fixes what is taken out.
        sentinels: ids in order of use; there are never more spans than these.
        share: of the tokens that is taken out, in spans of `mean_span` tokens in the mean.
    """
    hidden = _num_hidden(len(ids), share)
    shown = len(ids) - hidden
    spans = min(num_spans(len(ids), share, mean_span), len(sentinels))
    gone = _parts(hidden, spans, key, 0)
    kept = _parts(shown, spans, key, 1)
    source: list[int] = []
    target: list[int] = []
    at = 0
    for sentinel, keep, drop in zip(sentinels, kept, gone, strict=False):
        source += [*ids[at : at + keep].tolist(), sentinel]
        target += [sentinel, *ids[at + keep : at + keep + drop].tolist()]
        at += keep + drop
    return np.array([*source, end_id], np.int64), np.array([*target, end_id], np.int64)


def num_spans(length: int, share: float, mean_span: float) -> int:
    """How many spans `corrupt_spans` takes out of a text of `length` tokens, given enough sentinels."""
    hidden = _num_hidden(length, share)
    return min(max(round(hidden / mean_span), 1), hidden, max(length - hidden, 1))


def _num_hidden(length: int, share: float) -> int:
    return min(max(round(length * share), 1), max(length - 1, 1))


def _parts(total: int, count: int, key: int, stream: int) -> list[int]:
    """`total` as a sum of `count` numbers, each at least 1 where that is possible; every way is as likely."""
    if total < count:
        return [1] * total + [0] * (count - total)
    drawn = uniform(keys(np.arange(1, total), key, stream))
    cuts = np.sort(np.argsort(drawn, kind="stable")[: count - 1] + 1)
    return np.diff(np.concatenate([[0], cuts, [total]])).tolist()
