"""Texts that are none of what a classifier knows: the threshold, where it comes from, what it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score, recall_score
from tests.fit.conftest import Recipe
from tests.train.parts import rows, write_rows

from lexmill import load
from lexmill.data import open_source
from lexmill.errors import UserError
from lexmill.fit import fit
from lexmill.tasks import Classify, scope
from lexmill.tasks.classify import ClassifyOptions


@pytest.mark.parametrize("goal", ["balanced", "accuracy", "f1"])
def test_no_other_threshold_serves_the_goal_better(goal: scope.Objective) -> None:
    generator = np.random.default_rng(1)
    for _ in range(30):
        inside = generator.random(25) < 0.6
        inside[:2] = [True, False]
        right = inside & (generator.random(25) < 0.8)
        sure = np.round(generator.random(25) + 0.3 * inside, 1)  # many are equal

        def value(at: float, inside: np.ndarray = inside, right: np.ndarray = right, sure: np.ndarray = sure) -> float:
            refused = sure < at
            good = np.where(inside, right & ~refused, refused)
            if goal == "f1":
                return float(f1_score(~inside, refused, zero_division=0))
            return float((good[inside].mean() + good[~inside].mean()) / 2 if goal == "balanced" else good.mean())

        found = scope.choose(sure, right, inside, goal)
        every = [value(at) for at in np.arange(-0.05, 1.5, 0.05)]
        assert found.objective == pytest.approx(max(every))
        assert value(found.value) == pytest.approx(found.objective)


def test_measures_are_those_of_scikit_learn() -> None:
    inside = np.array([True, True, True, False, False, True])
    right = np.array([True, False, True, False, False, True])
    sure = np.array([0.9, 0.8, 0.3, 0.2, 0.6, 0.7])
    values, _ = scope.measure(sure, right, inside, 0.5)
    refused = sure < 0.5
    assert values["out_of_scope_recall"] == recall_score(~inside, refused) == 0.5
    assert values["out_of_scope_f1"] == f1_score(~inside, refused)
    assert values["in_scope_accuracy"] == 0.5
    assert values["joint_accuracy"] == 0.5
    assert values["out_of_scope_auroc"] == pytest.approx(7 / 8)
    assert set(scope.measure(sure, right, np.ones(6, bool), 0.5)[0]) == {
        "in_scope_accuracy", "joint_accuracy", "out_of_scope_precision",
    }  # fmt: skip


def test_certainty_is_the_largest_probability_or_the_energy() -> None:
    logits = np.array([[1.0, 2.0, 3.0], [1e4, 0.0, -1e4]])
    exp = np.exp(logits[0])
    assert scope.certainty(logits, "probability").tolist() == pytest.approx([exp[2] / exp.sum(), 1])
    assert scope.certainty(logits, "energy").tolist() == pytest.approx([np.log(exp.sum()), 1e4])


def test_clinc_rows_are_refused_below_what_validation_chose(recipe: Recipe, shared_data: Path, tmp_path: Path) -> None:
    """Real questions of four intents, and real ones out of scope."""
    folder = shared_data / "clinc150"

    def part(name: str, outside: int) -> Path:
        known = [row.values for row in open_source(folder / f"{name}.jsonl.xz")]
        labels = sorted({row["label"] for row in known})[:4]
        kept = [row for label in labels for row in [r for r in known if r["label"] == label][:12]]
        oos = [row.values for row in open_source(folder / f"oos_{name}.jsonl.xz").peek(outside)] if outside else []
        return write_rows(tmp_path / f"{name}.jsonl", [*kept, *oos])

    config = recipe(
        data_={"train": part("train", 3), "validation": part("val", 12), "test": part("test", 12)},
        train_={"epochs": 8, "learning_rate": 3e-3},
        options={"out_of_scope": "oos"},
    )
    artifact = fit(config, tmp_path / "out").artifact
    effect, found = artifact.manifest.history[-1].effect, artifact.manifest.metrics["test"]
    assert 0 < effect["out_of_scope_limit"] < 1
    assert {"in_scope_accuracy", "out_of_scope_recall", "out_of_scope_f1", "out_of_scope_auroc"} <= set(found)
    assert "oos" not in artifact.manifest.task.state["heads"][0]["labels"]  # pyright: ignore
    opened = load(artifact.path)
    task = opened.engine.task
    assert isinstance(task, Classify)
    assert task.limit == effect["out_of_scope_limit"]
    records = [row.values for row in open_source(tmp_path / "test.jsonl")]
    shown = opened.predict([row["text"] for row in records])
    refused = np.array([one["out_of_scope"] for one in shown])
    assert [one["label"] == "oos" for one in shown] == refused.tolist()
    assert refused.tolist() == [one["score"] < task.limit for one in shown]
    outside = np.array([row["label"] == "oos" for row in records])
    assert found["out_of_scope_recall"].value == pytest.approx(recall_score(outside, refused))
    right = [one["label"] == row["label"] for one, row in zip(shown, records, strict=True)]
    assert found["joint_accuracy"].value == pytest.approx(np.mean(right))
    answers = [answer for _, answer in opened.engine.run_stream(records, labelled=True)]
    assert task.item_scores(answers, records).tolist() == right
    assert Classify.from_state(json.loads(json.dumps(task.state()))).limit == task.limit


@pytest.mark.parametrize("changes", [{"multi_label": True}, {"heads": ("a",)}])
def test_only_one_label_of_one_head_has_a_scope(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="only one label of one head has a scope"):
        Classify.from_records([], {"text": "text"}, ClassifyOptions(out_of_scope="oos", **changes))


def test_validation_rows_out_of_scope_are_asked_for_before_training(recipe: Recipe, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", rows(12))
    for data in ({}, {"validation": file}, {"validation_fraction": 0.2}):
        with pytest.raises(UserError, match="no validation row has the label 'oos'"):
            fit(recipe(data_=data, options={"out_of_scope": "oos"}), tmp_path / "out")
