"""Documents run together: every token once, in order, in blocks of one length."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lexmill.data.batch import IGNORE, Example, Tokens
from lexmill.data.blocks import run_together, side_by_side


def documents(lengths: list[int]) -> list[Example]:
    ends = np.cumsum(lengths)
    return [
        Example(
            {"source": (Tokens(np.arange(end - length, end)),)},
            token_labels={"word": np.arange(end - length, end) % 3},
        )
        for end, length in zip(ends, lengths, strict=True)
    ]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(4, 16), st.booleans())
def test_blocks_hold_every_token_in_order_and_only_the_last_is_short(lengths, size, marked) -> None:
    first = (-1,) if marked else ()
    blocks = [
        (b.streams["source"][0].ids, b.token_labels["word"]) for b in run_together(documents(lengths), size, first)
    ]
    assert [len(ids) for ids, _ in blocks[:-1]] == [size] * (len(blocks) - 1)
    assert len(blocks[-1][0]) <= size
    assert all(ids[: len(first)].tolist() == list(first) for ids, _ in blocks)
    assert all(words[: len(first)].tolist() == [IGNORE] * len(first) for _, words in blocks)
    assert np.concatenate([ids[len(first) :] for ids, _ in blocks]).tolist() == list(range(sum(lengths)))
    assert np.concatenate([words[len(first) :] for _, words in blocks]).tolist() == [i % 3 for i in range(sum(lengths))]


def test_documents_are_read_as_blocks_are_wanted() -> None:
    read = []

    def stream():
        for example in documents([10] * 100):
            read.append(1)
            yield example

    blocks = run_together(stream(), 8)
    for _ in range(3):
        next(blocks)
    assert len(read) <= 3


def test_blocks_without_room_are_a_defect() -> None:
    with pytest.raises(ValueError, match="no room"):
        next(run_together(documents([3]), 1, (9,)))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(4, 16), st.booleans())
def test_blocks_of_texts_side_by_side_hold_every_token_and_no_sequence_holds_two_texts(lengths, size, marked) -> None:
    first = (-1,) if marked else ()
    blocks = list(side_by_side(documents(lengths), size, first))
    parts = [tokens.ids.tolist() for block in blocks for tokens in block.streams["source"]]
    assert all(part[: len(first)] == list(first) and len(part) > len(first) for part in parts)
    inner = [part[len(first) :] for part in parts]
    assert [token for part in inner for token in part] == list(range(sum(lengths)))
    owner = np.repeat(np.arange(len(lengths)), lengths)
    assert all(len(set(owner[part].tolist())) == 1 for part in inner)
    words = np.concatenate([block.token_labels["word"] for block in blocks])
    assert words[words != IGNORE].tolist() == [i % 3 for i in range(sum(lengths))]
    sizes = [sum(len(tokens.ids) for tokens in block.streams["source"]) for block in blocks]
    assert max(sizes) <= size
    assert min(sizes[:-1], default=size) >= size - len(first)
