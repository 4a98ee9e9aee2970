"""The cache of keys and values against what it stands for: all tokens of each sequence, attended to at once."""

from __future__ import annotations

import pytest
import torch

from lexmill.nn import Dense, KVCache, Packed, attend

HEADS, DIM = 4, 8


def drawn(count: int, heads: int = HEADS) -> torch.Tensor:
    return torch.randn(count, heads, DIM)


def fed(cache: KVCache, told: list[torch.Tensor], new: list[int]) -> tuple[torch.Tensor, torch.Tensor, Packed | Dense]:
    """Give each sequence so many new tokens, and write them down in `told` too."""
    keys = [drawn(count, 2) for count in new]
    told[:] = [torch.cat(both) for both in zip(told, keys, strict=True)]
    cache.begin(Packed.of(new))
    found = cache.layers[0].extend(torch.cat(keys), -torch.cat(keys))
    cache.commit()
    return found


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 1, 1], [2], [0, 2], [2, 2, 1, 0, 1, 0], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("lengths", [[3, 3, 3], [5, 1, 2]], ids=str)
def test_reordered_sequences_go_on_as_if_they_had_always_stood_so(order: list[int], lengths: list[int]) -> None:
    torch.manual_seed(0)
    cache, told = KVCache([(2, DIM)], 3, 4), [drawn(0, 2) for _ in range(3)]
    fed(cache, told, lengths)
    for _ in range(3):
        sequences = [i % len(told) for i in order]
        cache.keep(torch.tensor(sequences))
        told = [told[i] for i in sequences]
        keys, values, layout = fed(cache, told, [1] * len(told))
        assert isinstance(layout, Dense)
        assert layout.full == (len(set(layout.lengths.tolist())) == 1)
        q, all_keys = drawn(len(told)), torch.cat(told)
        one, whole = Packed.of([1] * len(told)), Packed.of([len(keys) for keys in told])
        found = attend(q, keys, values, one, layout, causal=True)
        torch.testing.assert_close(found, attend(q, all_keys, -all_keys, one, whole, causal=True))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("queries", [1, 2])
def test_keys_known_to_have_no_padding_give_what_they_give_otherwise(
    queries: int, window: int | None, *, biased: bool
) -> None:
    torch.manual_seed(1)
    keys, values, q = torch.randn(3, 6, 2, DIM), torch.randn(3, 6, 2, DIM), drawn(3 * queries)
    bias, asked = torch.randn(HEADS, 6, 6) if biased else None, Packed.of([queries] * 3)
    mask = torch.ones(3, 6, dtype=torch.bool)
    known, unknown = (
        attend(q, keys, values, asked, Dense(mask, full=full), causal=True, window=window, bias=bias)
        for full in (True, False)
    )
    torch.testing.assert_close(known, unknown)


def test_what_is_seen_is_worked_out_once_for_each_kind_of_query() -> None:
    torch.manual_seed(2)
    keys, layout = torch.randn(2, 4, HEADS, DIM), Dense(torch.tensor([[True] * 4, [True, True, False, False]]))
    asked, q = Packed.of([1, 1]), drawn(2)
    for bias in (None, torch.randn(HEADS, 4, 4), torch.randn(HEADS, 4, 4), None):
        for causal in (True, False):
            again = [attend(q, keys, keys, asked, layout, causal=causal, bias=bias) for _ in range(2)]
            fresh = attend(q, keys, keys, asked, Dense(layout.mask), causal=causal, bias=bias)
            assert torch.equal(again[0], fresh)
            assert torch.equal(again[1], fresh)
