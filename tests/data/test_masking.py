"""What is hidden of a text: shares, whole words, spans; all functions of keys alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lexmill.data.draws import keys, uniform
from lexmill.data.masking import Masking, corrupt_spans

RULE = Masking(mask_id=4, vocab_size=1000, special=(0, 1, 2, 3, 4), share=0.15)


def test_uniform_numbers_are_uniform_and_their_streams_unrelated() -> None:
    of = keys(np.arange(200_000), 7, 3)
    one, two = uniform(of), uniform(of, 1)
    for drawn in (one, two):
        assert 0 <= drawn.min() < drawn.max() < 1
        share = np.histogram(drawn, bins=20, range=(0, 1))[0] / len(drawn)
        assert abs(share - 0.05).max() < 0.003
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.01
    assert abs(np.corrcoef(one[1:], one[:-1])[0, 1]) < 0.01


def test_keys_differ_by_index_and_by_every_part() -> None:
    found = {int(k) for parts in ((0, 0), (0, 1), (1, 0), (1, 1)) for k in keys(np.arange(1000), *parts)}
    assert len(found) == 4000


def test_shares_are_those_of_bert_and_special_tokens_are_left_alone() -> None:
    ids = np.random.default_rng(0).integers(0, 1000, 200_000)
    shown, chosen = RULE.hide(ids, keys(np.arange(len(ids)), 0))
    usual = ids > 4
    assert not chosen[~usual].any()
    assert chosen[usual].mean() == pytest.approx(0.15, abs=0.003)
    assert (shown == ids)[~chosen].all()
    assert (shown[chosen] == 4).mean() == pytest.approx(0.8, abs=0.01)
    assert (shown[chosen] == ids[chosen]).mean() == pytest.approx(0.1, abs=0.01)


def test_words_are_hidden_whole() -> None:
    generator = np.random.default_rng(1)
    ids, starts = generator.integers(5, 1000, 50_000), generator.random(50_000) < 0.6
    starts[0] = True
    _, chosen = RULE.hide(ids, keys(np.arange(len(ids)), 0), starts)
    assert (chosen[1:] == chosen[:-1])[~starts[1:]].all()
    assert chosen.mean() == pytest.approx(0.15, abs=0.01)


@given(st.integers(1, 200), st.integers(0, 2**32), st.floats(0.05, 0.6), st.floats(1, 6), st.integers(1, 40))
def test_a_corrupted_text_and_its_spans_hold_the_text(length, key, share, mean_span, count) -> None:
    sentinels = list(range(10_000, 10_000 - count, -1))
    ids = np.arange(1, length + 1)
    source, target = corrupt_spans(ids, key, sentinels, 0, share=share, mean_span=mean_span)
    assert source[-1] == target[-1] == 0
    taken: dict[int, list[int]] = {}
    for token in target[:-1].tolist():
        if token in sentinels:
            taken[token] = []
        else:
            taken[list(taken)[-1]].append(token)
    whole = [t for token in source[:-1].tolist() for t in taken.get(token, [token])]
    assert whole == ids.tolist()
    assert list(taken) == sentinels[: len(taken)] == [t for t in source.tolist() if t in sentinels]
    assert all(taken.values())
    hidden = sum(map(len, taken.values()))
    assert hidden == min(max(round(length * share), 1), max(length - 1, 1))


def test_spans_have_the_mean_length_and_differ_by_key() -> None:
    ids, sentinels = np.arange(1, 1001), list(range(2000, 1900, -1))
    first, again, other = (corrupt_spans(ids, key, sentinels, 0)[1].tolist() for key in (1, 1, 2))
    assert first == again != other
    assert sum(t in sentinels for t in first) == 50
    assert len(first) == 150 + 50 + 1
