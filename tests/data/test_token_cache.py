"""The token cache gives back what was put in, whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lexmill.data.batch import IGNORE, Batch, Example, Tokens, collate
from lexmill.data.cache import TokenCache, build_cache, cache_key, encode_chunks
from lexmill.data.fingerprint import data_fingerprint
from lexmill.data.sources import open_source
from lexmill.errors import Failure, UserError


def example(seed: int, *, plain: bool = False) -> Example:
    """A random example: two streams of several sequences, heads that are missing here and there, token labels."""
    rng = np.random.default_rng(seed)

    def tokens() -> Tokens:
        ids = rng.integers(0, 30_000, rng.integers(1, 9))
        return Tokens(ids, rng.integers(0, 2, len(ids)) if rng.random() < 0.5 else None)

    streams = {"source": tuple(tokens() for _ in range(rng.integers(1, 4)))}
    if plain:
        return Example(streams, {"label": np.int64(rng.integers(9))})
    if rng.random() < 0.7:
        streams["target"] = (tokens(),)
    labels: dict[str, np.ndarray] = {}
    if rng.random() < 0.6:
        labels["intent"] = np.int64(rng.integers(9))
    if rng.random() < 0.6:
        labels["topics"] = rng.random(4).astype(np.float32)
    num_tokens = sum(len(seq.ids) for seq in streams["source"])
    tags = np.where(rng.random(num_tokens) < 0.3, IGNORE, rng.integers(0, 5, num_tokens))
    token_labels = {"source.tags": tags} if rng.random() < 0.8 else {}
    return Example(streams, labels, token_labels, float(np.float32(rng.random())))


def assert_same(first: Batch, second: Batch) -> None:
    assert first.streams.keys() == second.streams.keys()
    for name, stream in first.streams.items():
        for part in ("ids", "types", "positions", "offsets", "example"):
            ours, theirs = getattr(stream, part), getattr(second.streams[name], part)
            assert ours.dtype == theirs.dtype
            assert np.array_equal(ours, theirs), (name, part)
    for ours, theirs in ((first.labels, second.labels), (first.masks, second.masks)):
        assert ours.keys() == theirs.keys()
        for name, values in ours.items():
            assert values.dtype == theirs[name].dtype
            assert np.array_equal(values, theirs[name]), name
    assert np.array_equal(first.weight, second.weight)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.integers(1, 12), st.data(), st.booleans())
def test_a_gathered_batch_equals_the_collated_one(
    tmp_path: Path, seed: int, count: int, data: st.DataObject, plain: bool
) -> None:
    examples = [example(seed + at, plain=plain) for at in range(count)]
    cache = build_cache(tmp_path / "cache", examples, key=f"{seed} {count} {plain}")
    indices = np.array(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=8)))
    batch = cache.batch(indices)
    assert_same(batch, collate([cache[index] for index in indices.tolist()], cache.heads))
    assert_same(batch, collate([examples[index] for index in indices.tolist()], cache.heads))
    lengths = [sum(len(seq.ids) for owned in one.streams.values() for seq in owned) for one in examples]
    assert cache.lengths.tolist() == lengths
    assert len(cache) == count


def test_streams_and_heads_seen_late_are_blank_before(tmp_path: Path) -> None:
    late = [example(at, plain=True) for at in range(1500)]
    last = Example({"target": (Tokens(np.array([7])),)}, {"mood": np.float32([1, 2])}, {"target.tags": np.array([3])})
    cache = build_cache(tmp_path / "cache", [*late, last], "k")
    assert cache[1500].streams["target"][0].ids.tolist() == [7]
    assert cache[1500].token_labels["target.tags"].tolist() == [3]
    assert "mood" not in cache[0].labels
    batch = cache.batch(np.array([0, 1500]))
    assert batch.masks["mood"].tolist() == [False, True]
    assert_same(batch, collate([late[0], last], cache.heads))


def test_a_cache_with_the_same_key_is_not_made_again(tmp_path: Path) -> None:
    build_cache(tmp_path / "cache", [example(0)], "a")

    def never() -> Iterator[Example]:
        raise AssertionError("tokenized again")
        yield example(0)

    assert len(build_cache(tmp_path / "cache", never(), "a")) == 1
    again = build_cache(tmp_path / "cache", [example(1), example(2)], "b")
    assert (len(again), again.key) == (2, "b")


def test_a_failure_leaves_nothing_half_written(tmp_path: Path) -> None:
    def failing() -> Iterator[Example]:
        for at in range(3000):
            yield example(at, plain=True)
        raise UserError("a broken row", where="train.csv:3001")

    with pytest.raises(UserError, match="broken row"):
        build_cache(tmp_path / "cache", failing(), "a")
    assert list(tmp_path.iterdir()) == []


def test_what_killed_runs_left_is_removed_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    for name, age in (("cache.old.partial", 7200), ("cache.new.partial", 60), ("other.old.partial", 7200)):
        (tmp_path / name).mkdir()
        for path in (tmp_path / name / "weight", tmp_path / name):
            path.touch()
            os.utime(path, (time.time() - age,) * 2)
    build_cache(tmp_path / "cache", [example(0)], "key")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "cache.new.partial", "other.old.partial"]


def test_a_full_disk_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    def full() -> Iterator[Example]:
        yield example(0)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(Failure, match="the disk is full"):
        build_cache(tmp_path / "cache", full(), "a")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_cache_is_an_error_to_open_and_is_made_again(tmp_path: Path) -> None:
    directory = tmp_path / "cache"
    build_cache(directory, [example(0)], "a")
    ids = directory / "stream0.ids"
    ids.write_bytes(ids.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"stream0\.ids: \d+ bytes instead of"):
        TokenCache.open(directory)
    assert len(build_cache(directory, [example(0), example(1)], "a")) == 2
    (directory / "index.json").write_text("{")
    with pytest.raises(UserError, match="no token cache that can be read"):
        TokenCache.open(directory)


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not a token cache"):
        build_cache(tmp_path, [example(0)], "a")
    assert (tmp_path / "thesis.txt").exists()


def test_an_empty_sequence_and_a_label_of_another_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="empty sequence"):
        build_cache(tmp_path / "a", [Example({"source": (Tokens(np.zeros(0, np.int64)),)})], "a")
    one = {"source": (Tokens(np.array([1])),)}
    with pytest.raises(ValueError, match="shape"):
        build_cache(tmp_path / "b", [Example(one, {"x": np.zeros(2)}), Example(one, {"x": np.zeros(3)})], "a")


def test_an_example_outside_the_cache_is_an_index_error(tmp_path: Path) -> None:
    cache = build_cache(tmp_path / "cache", [example(0)], "a")
    assert cache[-1].weight == cache[0].weight
    with pytest.raises(IndexError):
        cache[1]


def test_chunks_are_encoded_in_order() -> None:
    sizes: list[int] = []

    def encode(rows: list[int]) -> list[Example]:
        sizes.append(len(rows))
        return [Example({"source": (Tokens(np.array([row])),)}) for row in rows]

    ids = [one.streams["source"][0].ids[0] for one in encode_chunks(iter(range(10)), encode, chunk=4)]
    assert ids == list(range(10))
    assert sizes == [4, 4, 2]


def test_the_key_depends_on_content_reading_tokenizer_and_preprocessing_but_not_on_the_place(tmp_path: Path) -> None:
    first, second = tmp_path / "a.csv", tmp_path / "b.csv"
    first.write_text("text,label\nx,y\n")
    shutil.copy(first, second)
    key = cache_key([open_source(first)], "t", {"max_length": 64})
    assert cache_key([open_source(second)], "t", {"max_length": 64}) == key
    others = [
        cache_key([open_source(first, encoding="latin-1")], "t", {"max_length": 64}),
        cache_key([open_source(first)], "u", {"max_length": 64}),
        cache_key([open_source(first)], "t", {"max_length": 65}),
    ]
    second.write_text("text,label\nx,z\n")
    others.append(cache_key([open_source(second)], "t", {"max_length": 64}))
    assert len({key, *others}) == 5


def test_a_data_fingerprint_says_what_the_data_was_without_its_content(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("text,label\nx,y\nz,y\n")
    found = data_fingerprint(open_source(path))
    assert {**found, "sha256": len(found["sha256"])} == {
        "name": "a.csv",
        "format": "csv",
        "rows": 2,
        "columns": ["text", "label"],
        "sha256": 64,
    }
