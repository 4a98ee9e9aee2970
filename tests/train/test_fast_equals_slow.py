"""Every fast path of training against its slow, obvious twin, on real questions to a bank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.train.parts import (
    InMemory,
    batch_of,
    classifier,
    distance,
    generator,
    gradients,
    rows,
    tiny_bert,
    tiny_llama,
    tokenizer,
)

from lexmill import models
from lexmill.data.batch import Example
from lexmill.data.order import Order
from lexmill.engine import Loaded, Request, TorchEngine
from lexmill.models import Model
from lexmill.nn.pooling import pool
from lexmill.tasks import Classify, Task
from lexmill.tasks.inputs import Arrange, dense, packed
from lexmill.train import Manner, accumulate

FP64, FP32 = 1e-10, 1e-5
Found = tuple[dict[str, float], dict[str, torch.Tensor]]


def encoded(task: Task, data: Sequence[dict[str, Any]]) -> list[Example]:
    return task.encode(data, tokenizer(), labelled=True)


def run(
    model: Model, task: Task, parts: Sequence[Sequence[Example]], arrange: Arrange = packed, seed: int = 0
) -> Found:
    batches = [batch_of(task, part) for part in parts]
    losses, _ = accumulate(model, task, batches, seed=seed, manner=Manner(arrange=arrange))
    return losses, gradients(model)


def assert_equal(fast: Found, slow: Found, tolerance: float) -> None:
    assert fast[0] == pytest.approx(slow[0], rel=tolerance)
    assert distance(fast[1], slow[1]) <= tolerance


def uneven(items: Sequence[Example]) -> list[Sequence[Example]]:
    """Three parts of very different sizes."""
    return [items[:1], items[1:4], items[4:]]


def bert_case(kind: str) -> tuple[Model, Task, list[Example]]:
    model, data = tiny_bert(), rows(16)
    if kind == "pairs":
        data = [{**row, "other": data[i - 1]["text"]} for i, row in enumerate(data)]
        task = classifier(data, model, columns={"text": "text", "text_pair": "other", "label": "label"})
    elif kind == "class weights":
        task = classifier([*data, *data[:1] * 9], model, class_weights="balanced")
    elif kind == "missing labels":
        data = [{**row, "label": None if i % 3 == 0 else row["label"]} for i, row in enumerate(data)]
        task = classifier(data, model)
    elif kind == "two heads":
        data = two_headed(data)
        task = classifier(data, model, heads=("label", "polite"), class_weights="balanced")
    elif kind == "several labels":
        data = [{**row, "label": [row["label"], "any"][: 1 + i % 2]} for i, row in enumerate(data)]
        task = classifier(data, model, multi_label=True, class_weights="balanced")
    else:
        task = classifier(data, model)
    return model, task, encoded(task, data)


def two_headed(data: list[dict[str, str]]) -> list[dict[str, Any]]:
    """A second label, and labels missing so that one micro-batch has none for the first head."""
    return [
        {
            **row,
            "label": None if i == 0 or i % 5 == 4 else row["label"],
            "polite": None if i % 4 == 1 else str(i % 3),
        }
        for i, row in enumerate(data)
    ]


BERT_CASES = ("plain", "pairs", "class weights", "missing labels", "two heads", "several labels")


@pytest.mark.parametrize("kind", BERT_CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FP64), (torch.float32, FP32)])
def test_packed_equals_padded(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    model, task, items = bert_case(kind)
    model.to(dtype)
    assert_equal(run(model, task, [items]), run(model, task, [items], dense), tolerance)


@pytest.mark.parametrize("kind", BERT_CASES)
def test_three_uneven_micro_batches_equal_one(kind: str) -> None:
    model, task, items = bert_case(kind)
    model.double()
    assert_equal(run(model, task, uneven(items)), run(model, task, [items]), FP64)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, FP64), (torch.float32, FP32)])
def test_a_decoder_packed_equals_padded(tied: bool, dtype: torch.dtype, tolerance: float) -> None:
    model = tiny_llama(tied_output=tied)
    task = generator(model)
    items = encoded(task, rows(10))
    model.to(dtype)
    assert_equal(run(model, task, [items]), run(model, task, [items], dense), tolerance)


def test_micro_batches_with_different_numbers_of_target_tokens_equal_one() -> None:
    model = tiny_llama()
    task = generator(model, max_length=20)
    items = encoded(task, rows(16))
    targets = [sum(int((labels != -100).sum()) for labels in one.token_labels.values()) for one in items]
    assert min(targets) == 0 < max(targets)
    model.double()
    slow = run(model, task, [items])
    assert_equal(run(model, task, uneven(items)), slow, FP64)
    # By mean of means the result would be another: the cut is not forgiving.
    means = [run(model, task, [part])[0].get("lm", 0.0) for part in uneven(items)]
    assert abs(sum(means) / 3 - slow[0]["lm"]) > 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_real_minilm_packed_and_cut_equals_padded(minilm: Path, dtype: torch.dtype) -> None:
    model = models.load(minilm, dtype=dtype)
    data = rows(8)
    task = classifier(data, model)
    items = encoded(task, data)
    slow = run(model, task, [items], dense)
    tolerance = FP64 if dtype == torch.float64 else FP32
    assert_equal(run(model, task, uneven(items)), slow, tolerance)


@pytest.mark.parametrize("arrange", [packed, dense])
def test_a_last_layer_for_the_first_token_alone_equals_a_full_one(arrange: Arrange) -> None:
    model, task, items = bert_case("plain")
    model.double()
    fast = run(model, task, [items], arrange)
    batch = batch_of(task, items)
    ids, positions, types, layout = arrange(batch.streams["source"], model.device)
    hidden = model.hidden(ids, positions, layout, types=types)
    outputs = {"label": model.heads["label"](pool(hidden, layout, "first"))}
    loss = task.item_losses(outputs, batch)["label"].mean()
    loss.backward()
    assert_equal(fast, ({"label": float(loss.detach())}, gradients(model)), FP64)


def test_examples_of_weight_zero_change_nothing() -> None:
    model, task, items = bert_case("plain")
    model.double()
    silent = [Example(one.streams, one.labels, weight=0.0) for one in items[:7]]
    assert_equal(run(model, task, [[*items, *silent]]), run(model, task, [items]), FP64)
    assert run(model, task, [silent]) == ({}, {})


def test_the_total_is_the_sum_over_heads_of_the_weighted_mean() -> None:
    model, task, items = bert_case("two heads")
    assert isinstance(task, Classify)
    batch = batch_of(task, items)
    losses, total = run(model.double(), task, [items])
    outputs = task.forward(model, batch)
    expected: dict[str, torch.Tensor] = {}
    for name, head in task.heads.items():
        there = torch.from_numpy(batch.masks[name])
        target = torch.from_numpy(batch.labels[name])[there]
        weight = torch.tensor(head.weights, dtype=torch.float32).double()
        expected[name] = torch.nn.functional.cross_entropy(outputs[name][there], target, weight)
    assert losses == pytest.approx({name: float(loss.detach()) for name, loss in expected.items()}, rel=1e-12)
    torch.stack(list(expected.values())).sum().backward()
    assert distance(total, gradients(model)) <= FP64


def test_batches_of_like_length_cover_each_example_once_an_epoch_as_random_ones_do() -> None:
    model = tiny_bert()
    data = rows(150)
    task = classifier(data, model)
    lengths = InMemory(task, encoded(task, data)).lengths

    def epoch(order: Order, number: int) -> Iterator[np.ndarray]:
        return (order.batch(number * order.steps_per_epoch + i) for i in range(order.steps_per_epoch))

    for order in (Order(150, 16, 3, lengths, window=3), Order(150, 16, 3)):
        for number in range(3):
            assert sorted(np.concatenate(list(epoch(order, number))).tolist()) == list(range(150))
    spread = [
        np.mean([np.ptp(lengths[batch]) for batch in epoch(Order(150, 16, 3, lengths, window=window), 0)])
        for window in (10, 1)
    ]
    assert spread[0] < spread[1] / 2


def test_the_engine_equals_the_naive_loop_of_padded_single_questions(minilm: Path) -> None:
    data = rows(24)
    model = models.load(minilm)
    task = classifier(data, model)
    answers = TorchEngine(Loaded(task, model, tokenizer(), "m"), token_budget=100).run([Request(row) for row in data])
    with torch.inference_mode():
        slow = [
            task.forward(model, batch_of(task, [one]), dense)["label"][0].numpy()
            for one in task.encode(data, tokenizer(), labelled=False)
        ]
    fast = np.stack([answer["label"] for answer in answers])
    assert np.abs(fast - np.stack(slow)).max() <= FP32 * np.abs(np.stack(slow)).max()


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_dropout_is_fixed_by_the_seed_alone(kind: str) -> None:
    model = tiny_bert() if kind == "bert" else tiny_llama()
    data = rows(12)
    task = classifier(data, model) if kind == "bert" else generator(model)
    items = encoded(task, data)
    model.set_dropout(0.2)
    model.train()
    first = run(model, task, uneven(items), seed=5)
    torch.rand(7)
    again, other = run(model, task, uneven(items), seed=5), run(model, task, uneven(items), seed=6)
    assert again[0] == first[0]
    assert all(torch.equal(again[1][name], one) for name, one in first[1].items())
    assert other[0] != first[0]
    assert distance(other[1], first[1]) > 1e-3


def test_dropout_hardly_moves_the_expected_loss() -> None:
    model, task, items = bert_case("plain")
    still = run(model, task, [items])[0]["label"]
    model.set_dropout(0.1)
    model.train()
    noisy = [run(model, task, [items], seed=seed)[0]["label"] for seed in range(30)]
    assert np.std(noisy) > 0
    assert abs(np.mean(noisy) - still) <= 0.1 * still
