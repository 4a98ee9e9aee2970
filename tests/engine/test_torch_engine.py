from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.small_classifier import small_classifier, write_artifact

from lexmill.engine import Cancelled, Expired, Loaded, Request, TorchEngine, open_engine
from lexmill.engine.probes import evidence, probe_records
from lexmill.engine.runtime import micro_batches, refuse_half_characters
from lexmill.errors import UserError
from lexmill.nn import matmul
from lexmill.nn.linear import Linear
from lexmill.tasks import Record


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return small_classifier()


def ask(text: str) -> Request:
    return Request({"question": text})


def logits(answers: list[Any]) -> np.ndarray:
    return np.stack([answer["label"] for answer in answers])


@pytest.mark.parametrize("budget", [1, 100, 2048])
def test_the_fast_path_equals_the_naive_loop(loaded: Loaded, budget: int) -> None:
    records = probe_records(loaded.task)
    engine = TorchEngine(loaded, token_budget=budget)
    fast = [loaded.task.evidence(answer) for answer in engine.run([Request(record) for record in records])]
    slow = evidence(loaded, records)
    assert [list(one) for one in fast] == [list(one) for one in slow]
    a, b = (np.array([list(one.values()) for one in found]) for found in (fast, slow))
    assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


@pytest.mark.skipif(not matmul._onednn_is_faster(), reason="this CPU's products are MKL's")
def test_an_engine_on_a_cpu_packs_the_weights_that_it_multiplies_by() -> None:
    loaded = small_classifier()
    TorchEngine(loaded)
    layers = [layer for layer in loaded.model.modules() if isinstance(layer, Linear)]
    assert layers
    assert all(layer.weight in matmul._PACKED for layer in layers)


def test_pairs_too(loaded: Loaded) -> None:
    pair = small_classifier(pair=True)
    records = probe_records(pair.task)[:20]
    fast = TorchEngine(pair).run([Request(record) for record in records])
    a, b = logits(fast), np.array([list(one.values()) for one in evidence(pair, records)])
    assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


def test_a_stream_equals_one_run_and_holds_only_a_chunk(loaded: Loaded) -> None:
    records = probe_records(loaded.task)
    engine = TorchEngine(loaded)
    drawn = 0

    def source() -> Iterator[Record]:
        nonlocal drawn
        for record in records:
            drawn += 1
            yield record

    ahead = []
    found: list[Any] = []
    for i, (record, answer) in enumerate(engine.run_stream(source(), chunk=10)):
        assert record is records[i]
        ahead.append(drawn - i)
        found.append(answer)
    assert max(ahead) <= 10
    whole = logits(engine.run([Request(record) for record in records]))
    assert np.abs(logits(found) - whole).max() <= 1e-5 * np.abs(whole).max()


def test_an_expired_or_cancelled_request_is_not_run(loaded: Loaded) -> None:
    gone = threading.Event()
    gone.set()
    late = Request({"question": "late"}, deadline=time.monotonic() - 1)
    early = Request({"question": "early"}, deadline=time.monotonic() + 60)
    answers = TorchEngine(loaded).run([late, Request({"question": "gone"}, cancel=gone), early])
    assert isinstance(answers[0], Expired)
    assert isinstance(answers[1], Cancelled)
    assert "label" in answers[2]


def test_an_item_that_cannot_be_encoded_does_not_fail_its_neighbours(loaded: Loaded) -> None:
    engine = TorchEngine(loaded)
    good, bad, also = engine.run([ask("one"), Request({"answer": "no question here"}), ask("two")])
    assert isinstance(bad, UserError)
    assert "question" in str(bad)
    alone = logits(engine.run([ask("one"), ask("two")]))
    assert np.abs(logits([good, also]) - alone).max() <= 1e-5 * np.abs(alone).max()


def test_a_request_for_what_the_engine_does_not_hold_is_refused(loaded: Loaded) -> None:
    engine = TorchEngine(loaded)
    other, head, adapter, own = engine.run(
        [
            Request({"question": "x"}, artifact="other"),
            Request({"question": "x"}, head="label"),
            Request({"question": "x"}, adapter="fr"),
            Request({"question": "x"}, artifact="small"),
        ]
    )
    assert "unknown model 'other'" in str(other)
    assert isinstance(head, UserError)
    assert isinstance(adapter, UserError)
    assert "label" in own


def test_no_requests_no_answers(loaded: Loaded) -> None:
    assert TorchEngine(loaded).run([]) == []
    assert list(TorchEngine(loaded).run_stream([])) == []


def test_an_artefact_answers_as_the_model_it_was_written_from(loaded: Loaded, tmp_path: Path) -> None:
    write_artifact(loaded, tmp_path / "tickets")
    engine = open_engine(tmp_path / "tickets")
    assert engine.name == "tickets"
    requests = [ask("where is my card"), ask("refund?")]
    a, b = logits(engine.run(requests)), logits(TorchEngine(loaded).run(requests))
    assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max()


def test_an_unknown_runtime_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="abacus"):
        open_engine(tmp_path, "abacus")


@settings(max_examples=50)
@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
def test_micro_batches_hold_every_item_once_sorted_and_within_the_budget(lengths: list[int], budget: int) -> None:
    parts = list(micro_batches(dict(enumerate(lengths)), budget))
    flat = [i for part in parts for i in part]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[i] for i in flat] == sorted(lengths)
    assert all(len(part) == 1 or sum(lengths[i] for i in part) <= budget for part in parts)


@pytest.mark.parametrize(
    "record", [{"text": "a \ud800 b"}, {"text": ["a", "\udfff"]}, {"messages": [{"content": "\ud800"}]}]
)
def test_half_of_a_surrogate_pair_is_an_error_in_words(record: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="half of a surrogate pair"):
        refuse_half_characters(record)
    refuse_half_characters({"text": "\U0001f600", "n": 3})
