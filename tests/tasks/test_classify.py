"""Classification: labels in and out, weights in the loss, and what a caller sees."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from tests.train.parts import COLUMNS, batch_of, classifier, rows, tiny_bert, tokenizer

from lexmill.engine import Loaded, Request, TorchEngine
from lexmill.errors import UserError
from lexmill.tasks import Classify
from lexmill.tasks.classify import ClassifyAnswer, ClassifyOptions, ClassifyRequest
from lexmill.train import accumulate

LABELS = ("balance", "card", "fee")


def task_of(labels: list[Any], **options: Any) -> Classify:
    records = [{"text": f"question {i}", "label": label} for i, label in enumerate(labels)]
    return Classify.from_records(records, COLUMNS, ClassifyOptions(**options))


def test_labels_are_learnt_in_alphabetical_order_and_survive_the_state() -> None:
    task = task_of(["fee", "card", "balance", "card"], class_weights="balanced", max_length=9)
    again = Classify.from_state(task.state())
    assert again.state() == task.state()
    assert again.labels() == task.labels() == {"label": LABELS}
    assert again.options == task.options


def test_a_text_is_cut_to_max_length_and_has_its_label() -> None:
    task = task_of(list(LABELS), max_length=6)
    [example] = task.encode([{"text": "how much is it " * 9, "label": "card"}], tokenizer(), labelled=True)
    [source] = example.streams["source"]
    assert len(source.ids) == 6
    assert example.labels["label"] == 1


def test_pairs_are_one_sequence_with_two_segments() -> None:
    data = [{"a": "is it free", "b": "what does it cost", "label": label} for label in LABELS]
    task = Classify.from_records(data, {"text": "a", "text_pair": "b", "label": "label"}, ClassifyOptions())
    [example] = task.encode(data[:1], tokenizer(), labelled=False)
    [source] = example.streams["source"]
    assert source.types is not None
    assert source.types.tolist() == [0] * 5 + [1] * 5
    [record] = task.items(ClassifyRequest(texts=[["x", "y"]]))
    assert record == {"a": "x", "b": "y"}
    with pytest.raises(UserError, match=r"texts\[0\]: this model classifies pairs"):
        task.items(ClassifyRequest(texts=["x"]))
    assert task.items(task.probe(["x", "y"])) == [{"a": "x", "b": "y"}, {"a": "y", "b": "x"}]


def test_a_single_text_task_refuses_pairs() -> None:
    with pytest.raises(UserError, match=r"texts\[1\]: this model classifies single texts"):
        task_of(list(LABELS)).items(ClassifyRequest(texts=["x", ["x", "y"]]))


@pytest.mark.parametrize("form", ["lists", "text"])
def test_several_labels_come_as_lists_or_with_bars_between_them(form: str) -> None:
    given: list[Any] = [["card", "fee"], ["balance"], [], None]
    if form == "text":
        given = ["card| fee", "balance", "", None]
    task = task_of(given, multi_label=True)
    assert task.labels() == {"label": LABELS}
    records = [{"text": "x", "label": label} for label in given]
    examples = task.encode(records, tokenizer(), labelled=True)
    assert [one.labels["label"].tolist() for one in examples[:3]] == [[0, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert "label" not in examples[3].labels


def test_a_list_without_multi_label_says_what_to_set() -> None:
    with pytest.raises(UserError, match=r"options\.multi_label"):
        task_of([["card", "fee"], ["balance"]])


def test_an_unknown_label_is_named() -> None:
    with pytest.raises(UserError, match="'refund' of column 'label' was not seen") as raised:
        task_of(list(LABELS)).encode([{"text": "x", "label": "refund"}], tokenizer(), labelled=True)
    assert "balance, card, fee" in (raised.value.hint or "")


@pytest.mark.parametrize(("labels", "found"), [(["card"] * 3, "only 'card'"), ([None, ""], "no label")])
def test_fewer_than_two_classes_are_refused(labels: list[Any], found: str) -> None:
    with pytest.raises(UserError, match=found):
        task_of(labels)


def test_balanced_class_weights_are_those_of_scikit_learn() -> None:
    labels = ["card"] * 7 + ["fee"] * 2 + ["balance"]
    task = task_of(labels, class_weights="balanced")
    expected = compute_class_weight("balanced", classes=np.array(LABELS), y=np.array(labels))
    assert task.heads["label"].weights == pytest.approx(expected.tolist())
    assert task_of(labels).heads["label"].weights == (1.0, 1.0, 1.0)


def test_the_weighted_loss_is_that_of_torch() -> None:
    data = [*rows(12), *rows(1) * 8]
    model = tiny_bert()
    task = classifier(data, model, class_weights="balanced")
    batch = batch_of(task, task.encode(data, tokenizer(), labelled=True))
    ours = accumulate(model, task, [batch], seed=0)[0]["label"]
    weight = torch.tensor(task.heads["label"].weights)
    logits = task.forward(model, batch)["label"]
    theirs = torch.nn.CrossEntropyLoss(weight)(logits, torch.from_numpy(batch.labels["label"]))
    assert ours == pytest.approx(float(theirs.detach()), rel=1e-6)


def test_label_smoothing_is_that_of_torch_and_refused_where_it_cannot_act() -> None:
    data = rows(6)
    plain, smooth = (classifier(data, tiny_bert(), label_smoothing=p) for p in (0.0, 0.1))
    batch = batch_of(smooth, smooth.encode(data, tokenizer(), labelled=True))
    logits = torch.randn(6, len(smooth.labels()["label"]))
    target = torch.from_numpy(batch.labels["label"])
    expected = torch.nn.functional.cross_entropy(logits, target, reduction="none", label_smoothing=0.1)
    assert torch.equal(smooth.item_losses({"label": logits}, batch)["label"], expected)
    assert not torch.equal(plain.item_losses({"label": logits}, batch)["label"], expected)
    with pytest.raises(UserError, match="not smoothed"):
        task_of([["a"], ["b"]], multi_label=True, label_smoothing=0.1)


def test_the_loss_of_several_labels_is_that_of_torch() -> None:
    data = [{**row, "label": [row["label"], "any"][: i % 3]} for i, row in enumerate(rows(12))]
    model = tiny_bert()
    task = classifier(data, model, multi_label=True)
    batch = batch_of(task, task.encode(data, tokenizer(), labelled=True))
    ours = accumulate(model, task, [batch], seed=0)[0]["label"]
    theirs = torch.nn.BCEWithLogitsLoss()(task.forward(model, batch)["label"], torch.from_numpy(batch.labels["label"]))
    assert ours == pytest.approx(float(theirs.detach()), rel=1e-6)


LOGITS = {"label": np.log(np.array([0.2, 0.7, 0.1], np.float32))}


def test_an_answer_is_the_best_label_and_its_probability() -> None:
    shown = task_of(list(LABELS)).render(LOGITS)
    assert shown == {"label": "card", "score": pytest.approx(0.7, rel=1e-5)}


def test_top_k_and_raw_show_more() -> None:
    task = task_of(list(LABELS))
    shown = task.render(LOGITS, ClassifyRequest(texts=["x"], top_k=2, raw=True))
    assert [one["label"] for one in shown["labels"]] == ["card", "balance"]
    assert sum(one["score"] for one in shown["labels"]) == pytest.approx(0.9)
    assert shown["logits"] == {f"label/{label}": float(LOGITS["label"][i]) for i, label in enumerate(LABELS)}
    assert task.render(LOGITS, ClassifyRequest(texts=["x"], top_k=9))["labels"][-1]["label"] == "fee"
    ClassifyAnswer.model_validate(shown)


@pytest.mark.parametrize(("threshold", "expected"), [(0.5, ["card", "fee"]), (0.9, ["card"]), (0.99, [])])
def test_several_labels_are_those_above_the_threshold(threshold: float, expected: list[str]) -> None:
    task = task_of([["card"], ["fee"], ["balance"]], multi_label=True, threshold=threshold)
    shown = task.render({"label": np.array([-5.0, 3.0, 0.1], np.float32)})
    assert [one["label"] for one in shown["labels"]] == expected


def test_the_probability_of_an_extreme_logit_does_not_overflow() -> None:
    multi = task_of([["card"], ["fee"], ["balance"]], multi_label=True)
    extreme = np.array([-1e4, 1e4, 0], np.float32)
    assert multi.probabilities(extreme).tolist() == [0, 1, 0.5]
    assert task_of(list(LABELS)).probabilities(extreme).tolist() == [0, 1, 0]


def test_several_heads_answer_under_their_names_and_are_scored_where_they_have_labels() -> None:
    data: list[dict[str, Any]] = [
        {**row, "polite": ["yes", "no", None][i % 3], "label": None if i % 4 == 0 else row["label"]}
        for i, row in enumerate(rows(24))
    ]
    model = tiny_bert()
    task = classifier(data, model, heads=("label", "polite"))
    engine = TorchEngine(Loaded(task, model, tokenizer()))
    answers = engine.run([Request(record) for record in data])
    shown = task.render(answers[0])
    assert list(shown["heads"]) == ["label", "polite"]
    ClassifyAnswer.model_validate(shown)
    found = task.evaluate(answers, data)
    right = {
        head: [task.render(a)["heads"][head]["label"] == r[head] for a, r in zip(answers, data, strict=True) if r[head]]
        for head in task.heads
    }
    assert found.values["label/accuracy"] == pytest.approx(np.mean(right["label"]))
    assert found.values["polite/accuracy"] == pytest.approx(np.mean(right["polite"]))
    assert found.values["accuracy"] == pytest.approx((np.mean(right["label"]) + np.mean(right["polite"])) / 2)


def test_scoring_records_without_labels_is_an_error() -> None:
    with pytest.raises(UserError, match="no record has a label in column 'label'"):
        task_of(list(LABELS)).evaluate([LOGITS], [{"text": "x", "label": None}])
