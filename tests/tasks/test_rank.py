"""Ranking: targets from labels, candidates in one request, metrics against scikit-learn's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, ndcg_score, roc_auc_score
from tests.fit.conftest import Recipe
from tests.serve.conftest import Start
from tests.train.parts import distance, gradients, tiny_bert, tokenizer, write_rows

from lexmill import load, metrics
from lexmill.data import open_source
from lexmill.data.batch import collate
from lexmill.engine import TorchEngine
from lexmill.errors import UserError
from lexmill.fit import fit
from lexmill.tasks import Rank
from lexmill.tasks.inputs import dense
from lexmill.tasks.rank import RankOptions, RankRequest, Scores
from lexmill.train import accumulate
from lexmill.train.step import Manner

COLUMNS = {"text": "a", "text_pair": "b", "label": "label"}
DATA = [{"a": f"question {i} of it", "b": f"what {i % 3} costs", "label": i % 2} for i in range(9)]


def task_of(data: list[dict[str, Any]], **columns: str) -> Rank:
    return Rank.from_records(data, {**COLUMNS, **columns}, RankOptions())


def test_the_loss_is_that_of_torch_packed_padded_and_cut() -> None:
    model = tiny_bert().double()
    task = task_of(DATA)
    task.attach(model)
    items = task.encode([*DATA, {**DATA[0], "label": None}], tokenizer(), labelled=True)
    blank = {"rank": np.zeros((), np.float32)}

    def run(parts: list[Any], **how: Any) -> tuple[float, dict[str, torch.Tensor]]:
        found, _ = accumulate(model, task, [collate(part, blank) for part in parts], seed=0, manner=Manner(**how))
        return found["rank"], gradients(model)

    whole, padded, cut = run([items]), run([items], arrange=dense), run([items[:1], items[1:4], items[4:]])
    logits = task.forward(model, collate(items[:9], blank))["rank"]
    target = torch.tensor([float(row["label"]) for row in DATA], dtype=torch.float64)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
    assert whole[0] == pytest.approx(float(expected.detach()), rel=1e-10)
    for other in (padded, cut):
        assert other[0] == pytest.approx(whole[0], rel=1e-10)
        assert distance(other[1], whole[1]) <= 1e-10


@pytest.mark.parametrize(
    ("labels", "graded", "targets"), [([0, 1, 1], False, [0, 1, 1]), ([5, 1, 2], True, [1, 0, 0.25])]
)
def test_labels_become_shares_of_their_range(labels: list[int], graded: bool, targets: list[float]) -> None:
    data = [{**DATA[i], "label": label} for i, label in enumerate(labels)]
    task = task_of(data)
    assert (task.graded, task.metric) == (graded, "spearman" if graded else "average_precision")
    examples = task.encode(data, tokenizer(), labelled=True)
    assert [float(one.labels["rank"]) for one in examples] == targets
    assert Rank.from_state(json.loads(json.dumps(task.state()))).state() == task.state()


@pytest.mark.parametrize(("label", "message"), [("good", "'good' of column 'label' is not a number"), (7, "label 7")])
def test_labels_that_cannot_be_used_say_why(label: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        task_of(DATA).encode([{**DATA[0], "label": label}], tokenizer(), labelled=True)
    with pytest.raises(UserError, match="only 1"):
        task_of([DATA[1]])


def test_metrics_are_those_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    gold = generator.integers(0, 2, 40)
    scores = np.round(gold + generator.normal(0, 1, 40), 1)  # rounded: some are equal
    data = [{"a": "x", "b": "y", "label": int(one), "qid": i % 8} for i, one in enumerate(gold)]
    answers = [Scores(np.array([one], np.float32), None) for one in scores]
    found = task_of(data, group="qid").evaluate(answers, data)
    assert found.values["roc_auc"] == pytest.approx(roc_auc_score(gold, scores))
    assert found.values["average_precision"] == pytest.approx(average_precision_score(gold, scores))
    groups = [np.arange(40) % 8 == i for i in range(8)]
    groups = [rows for rows in groups if gold[rows].any()]
    distinct = [rows for rows in groups if len(set(scores[rows])) == rows.sum()]
    expected = [ndcg_score([gold[rows]], [scores[rows]], k=10) for rows in distinct]
    assert [metrics.ndcg(gold[rows], scores[rows]) for rows in distinct] == pytest.approx(expected)
    first = [1 + int((scores[rows][gold[rows] == 0] >= scores[rows][gold[rows] == 1].max()).sum()) for rows in groups]
    assert found.values["mrr"] == pytest.approx(np.mean(1 / np.array(first)))
    assert set(found.intervals) == {"accuracy", "roc_auc", "average_precision", "mrr", "ndcg@10"}


def test_real_questions_are_fitted_and_candidates_ranked_and_served(
    recipe: Recipe, start: Start, shared_data: Path, tmp_path: Path
) -> None:
    data = [row.values for row in open_source(shared_data / "atec_pairs" / "dev.jsonl.xz").peek(40)]
    train = write_rows(tmp_path / "train.jsonl", data)
    artifact = fit(recipe(data_={"train": train, "test": train}, task="rank"), tmp_path / "out").artifact
    assert set(artifact.manifest.metrics["test"]) == {"accuracy", "f1", "roc_auc", "average_precision"}
    candidates = [row["text_b"] for row in data[:5]]
    query = {"query": data[0]["text_a"], "candidates": candidates}
    opened = load(artifact.path)
    ranked, pair = opened.predict([query, [data[0]["text_a"], candidates[2]]], raw=True)
    assert sorted(one["index"] for one in ranked["ranking"]) == [0, 1, 2, 3, 4]
    assert [one["score"] for one in ranked["ranking"]] == sorted((o["score"] for o in ranked["ranking"]), reverse=True)
    assert pair["score"] == pytest.approx(next(o["score"] for o in ranked["ranking"] if o["index"] == 2), abs=1e-6)
    reply = start({"faq": TorchEngine(artifact)}).post("/v1/rank", json={"items": [query], "top_k": 2})
    assert [one["text"] for one in reply.json()["answers"][0]["ranking"]] == [
        one["text"] for one in ranked["ranking"][:2]
    ]
    with pytest.raises(UserError, match=r"items\[0\]: a pair of 3 texts"):
        opened.engine.task.items(RankRequest(items=[["a", "b", "c"]]))
