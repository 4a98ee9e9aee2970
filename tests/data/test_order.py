"""The data order is a function of (seed, epoch, index) alone."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lexmill.data.order import Order, permute
from lexmill.data.packing import micro_batches


def epoch(order: Order, number: int) -> np.ndarray:
    first = number * order.steps_per_epoch
    return np.concatenate([order.batch(first + step) for step in range(order.steps_per_epoch)])


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 2**40), st.booleans(), st.integers(1, 6))
def test_every_epoch_is_a_permutation(num: int, batch_size: int, seed: int, windowed: bool, window: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 50, num) if windowed else None
    order = Order(num, batch_size, seed, lengths, window)
    for number in range(2):
        assert sorted(epoch(order, number).tolist()) == list(range(num))
    sizes = {len(order.batch(step)) for step in range(order.steps_per_epoch)}
    assert sizes <= {batch_size, num % batch_size or batch_size}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers())
def test_permute_is_a_permutation_of_the_range(size: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


def test_epochs_and_seeds_differ() -> None:
    order, other = Order(1000, 32, 0), Order(1000, 32, 1)
    assert not np.array_equal(epoch(order, 0), epoch(order, 1))
    assert not np.array_equal(epoch(order, 0), epoch(other, 0))


def test_a_batch_does_not_depend_on_what_was_asked_before() -> None:
    lengths = np.arange(1000) % 37
    order = Order(1000, 16, 5, lengths, window=4)
    steps = np.random.default_rng(0).permutation(3 * order.steps_per_epoch)
    asked = {int(step): order.batch(int(step)) for step in steps}
    for step, batch in asked.items():
        assert np.array_equal(batch, Order(1000, 16, 5, lengths, window=4).batch(step))


def test_changing_a_batch_leaves_the_order_as_it_was() -> None:
    order = Order(100, 10, 0)
    order.batch(3)[:] = -1
    assert order.batch(3).min() >= 0


def test_the_order_stays_what_it_was_in_earlier_versions() -> None:
    assert Order(10_003, 8, 42).batch(1_251).tolist() == GOLDEN
    assert Order(10_003, 8, 42).batch(2_502).tolist() != GOLDEN


def test_windows_make_the_texts_of_a_batch_nearly_equal_and_shuffle_batches() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 3200)
    plain, windowed = Order(3200, 32, 0), Order(3200, 32, 0, lengths)
    spread = [np.ptp(lengths[windowed.batch(step)]) for step in range(100)]
    assert np.mean(spread) < 5 < np.mean([np.ptp(lengths[plain.batch(step)]) for step in range(100)])
    means = [lengths[windowed.batch(step)].mean() for step in range(50)]
    assert abs(np.corrcoef(means, np.arange(50))[0, 1]) < 0.5


def test_a_batch_of_a_vast_data_set_is_found_at_once() -> None:
    order = Order(10**12, 32, 0)
    batch = order.batch(3 * order.steps_per_epoch // 2)
    assert len(set(batch.tolist())) == 32
    assert batch.max() < 10**12


def test_positions_are_uniform() -> None:
    where = np.array([permute(np.arange(7), 7, seed)[0] for seed in range(1400)])
    counts = np.bincount(where, minlength=7)
    assert ((counts - 200) ** 2 / 200).sum() < 22.5  # chi-square, 6 degrees of freedom, p = 0.001


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=60), st.integers(1, 200))
def test_micro_batches_cover_the_batch_within_the_budget(tokens: list[int], budget: int) -> None:
    lengths = np.array([0, *tokens])
    indices = np.arange(1, len(lengths))[::-1]
    parts = micro_batches(indices, lengths, budget)
    assert sorted(np.concatenate(parts).tolist()) == sorted(indices.tolist())
    for part in parts:
        assert len(part) == 1 or lengths[part].sum() <= budget
    flat = lengths[np.concatenate(parts)]
    assert (np.diff(flat) >= 0).all()


def test_micro_batches_fill_the_budget() -> None:
    parts = micro_batches(np.array([4, 2, 0, 1, 3]), np.array([10, 10, 10, 5, 100]), 25)
    assert [part.tolist() for part in parts] == [[3, 2, 0], [1], [4]]


GOLDEN = [9919, 8881, 3499, 5328, 3923, 6175, 4946, 5078]
