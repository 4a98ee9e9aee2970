"""The numbers of an evaluation against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as theirs

from lexmill.tasks import scoring

LABELS = ("a", "b", "c")


def random_probabilities(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet([1.0] * 3, count)


def test_single_label_scores_are_those_of_scikit_learn() -> None:
    probabilities = random_probabilities(200)
    gold = np.random.default_rng(1).integers(0, 3, 200)
    predicted = probabilities.argmax(1)
    found = scoring.single_label(probabilities, gold, LABELS)
    assert found.values["accuracy"] == pytest.approx(theirs.accuracy_score(gold, predicted))
    assert found.values["macro_f1"] == pytest.approx(theirs.f1_score(gold, predicted, average="macro"))
    assert found.values["f1"] == pytest.approx(theirs.f1_score(gold, predicted, average="weighted"))
    low, high = found.intervals["accuracy"]
    assert low < found.values["accuracy"] < high
    assert [row["label"] for row in found.tables["per_class"]] == list(LABELS)
    assert sum(row["count"] for row in found.tables["calibration"]) == 200


def test_multi_label_scores_are_those_of_scikit_learn() -> None:
    probabilities = np.random.default_rng(0).random((200, 3))
    gold = (np.random.default_rng(1).random((200, 3)) < 0.4).astype(np.float32)
    predicted = probabilities >= 0.6
    found = scoring.multi_label(probabilities, gold, LABELS, 0.6)
    assert found.values["accuracy"] == pytest.approx(theirs.accuracy_score(gold, predicted))
    assert found.values["macro_f1"] == pytest.approx(theirs.f1_score(gold, predicted, average="macro"))
    assert found.values["f1"] == pytest.approx(theirs.f1_score(gold, predicted, average="micro"))


def test_heads_are_combined_by_their_mean_and_kept_under_their_names() -> None:
    one = scoring.single_label(random_probabilities(50), np.zeros(50, np.int64), LABELS)
    two = scoring.single_label(random_probabilities(50, 2), np.ones(50, np.int64), LABELS)
    both = scoring.combine({"x": one, "y": two})
    assert both.values["accuracy"] == pytest.approx((one.values["accuracy"] + two.values["accuracy"]) / 2)
    assert both.values["x/macro_f1"] == one.values["macro_f1"]
    assert both.intervals["y/accuracy"] == two.intervals["accuracy"]
    assert both.tables["x/per_class"] == one.tables["per_class"]
