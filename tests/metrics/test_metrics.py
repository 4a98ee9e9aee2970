"""Metrics against scikit-learn and scipy, by hand, and over random cases."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.stats import binomtest
from sklearn import metrics as oracle

from lexmill import metrics
from lexmill.metrics import Average

AVERAGES: tuple[Average, ...] = get_args(Average)
CLASSES = 4


@st.composite
def single(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    items = draw(st.integers(1, 30))
    labels = hnp.arrays(np.int64, items, elements=st.integers(0, CLASSES - 1))
    return draw(labels), draw(labels)


@st.composite
def several(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    labels = hnp.arrays(np.bool_, (draw(st.integers(1, 12)), CLASSES))
    return draw(labels), draw(labels)


@settings(max_examples=60, deadline=None)
@given(single())
def test_single_labels_agree_with_scikit_learn(labels: tuple[np.ndarray, np.ndarray]) -> None:
    truth, predicted = labels
    counts = metrics.count(truth, predicted, CLASSES)
    assert metrics.accuracy(truth, predicted) == pytest.approx(oracle.accuracy_score(truth, predicted))
    for average in AVERAGES:
        expected = oracle.f1_score(truth, predicted, average=average, zero_division=0)
        assert metrics.f1(counts, average) == pytest.approx(expected)
    expected = oracle.confusion_matrix(truth, predicted, labels=range(CLASSES))
    np.testing.assert_array_equal(metrics.confusion(truth, predicted, CLASSES), expected)
    table = oracle.precision_recall_fscore_support(truth, predicted, labels=range(CLASSES), zero_division=0)
    for row, precision, recall, f1, support in zip(metrics.per_class(counts, "abcd"), *table, strict=True):
        assert (row["precision"], row["recall"], row["f1"]) == pytest.approx((precision, recall, f1))
        assert row["support"] == support


@settings(max_examples=60, deadline=None)
@given(several())
def test_several_labels_agree_with_scikit_learn(labels: tuple[np.ndarray, np.ndarray]) -> None:
    truth, predicted = labels
    counts = metrics.count_multilabel(truth, predicted)
    assert metrics.exact_match(truth, predicted) == pytest.approx(oracle.accuracy_score(truth, predicted))
    assert metrics.f1(counts, "micro") == pytest.approx(
        oracle.f1_score(truth, predicted, average="micro", zero_division=0)
    )
    used = (truth | predicted).any(0)
    for average in ("macro", "weighted"):
        each = oracle.f1_score(truth, predicted, average=None, zero_division=0)[used]
        weights = np.ones(len(each)) if average == "macro" else truth.sum(0)[used]
        expected = np.average(each, weights=weights) if weights.sum() else 0.0
        assert metrics.f1(counts, average) == pytest.approx(expected)


def test_tables_by_hand() -> None:
    truth = np.array([0, 0, 0, 0, 1, 1, 2])
    predicted = np.array([0, 1, 1, 2, 1, 0, 2])
    matrix = metrics.confusion(truth, predicted, 3)
    assert metrics.confused(matrix, ["a", "b", "c"], top=2) == [
        {"truth": "a", "predicted": "b", "count": 2, "share": 0.5},
        {"truth": "a", "predicted": "c", "count": 1, "share": 0.25},
    ]
    assert len(metrics.confused(matrix, ["a", "b", "c"])) == 3
    assert metrics.per_class(metrics.count(truth, predicted, 3), ["a", "b", "c"])[1] == {
        "label": "b",
        "precision": pytest.approx(1 / 3),
        "recall": 0.5,
        "f1": pytest.approx(0.4),
        "support": 2,
        "predicted": 3,
    }


def test_what_cannot_be_measured_is_refused() -> None:
    none, two = np.zeros(0, np.int64), np.array([0, 1])
    for call in (
        lambda: metrics.accuracy(none, none),
        lambda: metrics.accuracy(two, none),
        lambda: metrics.confusion(two, two, 1),
        lambda: metrics.confusion(two, two - 1, 2),
        lambda: metrics.expected_calibration_error(none.astype(float), none.astype(bool)),
        lambda: metrics.brier_score(np.ones((1, 2)), two),
        lambda: metrics.accuracy_interval(none.astype(bool)),
        lambda: metrics.f1_interval(none, none, "macro"),
        lambda: metrics.bootstrap(lambda index: 0.0, 0),
        lambda: metrics.mcnemar(two.astype(bool), none.astype(bool)),
    ):
        # Where shapes are checked at run time, jaxtyping refuses first, with a TypeError.
        with pytest.raises((ValueError, TypeError)):
            call()


def test_calibration_error_by_hand() -> None:
    confidence = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    correct = np.array([True, True, True, False, True, True])
    # Bins of width 1/15: four items at 0.95 with accuracy 0.75, two at 0.55 with accuracy 1.
    assert metrics.expected_calibration_error(confidence, correct) == pytest.approx((4 * 0.2 + 2 * 0.45) / 6)
    rows = metrics.reliability(np.array([0.0, 0.5, 0.50001, 1.0]), np.ones(4, bool), bins=2)
    assert [(row["low"], row["high"], row["count"]) for row in rows] == [(0.0, 0.5, 2), (0.5, 1.0, 2)]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_calibration_agrees_with_its_definition(items: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    probabilities = generator.dirichlet(np.ones(3), items)
    truth = generator.integers(0, 3, items)
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == truth
    expected = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    assert metrics.expected_calibration_error(confidence, correct) == pytest.approx(expected)
    squares = [sum((p - (k == t)) ** 2 for k, p in enumerate(row)) for row, t in zip(probabilities, truth, strict=True)]
    assert metrics.brier_score(probabilities, truth) == pytest.approx(np.mean(squares))


def test_brier_score_agrees_with_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    probability, truth = generator.random(50), generator.random(50) < 0.5
    expected = oracle.brier_score_loss(truth, probability)
    assert metrics.brier_score(probability[:, None], truth[:, None]) == pytest.approx(expected)
    both = np.stack([1 - probability, probability], 1)
    assert metrics.brier_score(both, truth.astype(np.int64)) == pytest.approx(2 * expected)


def answers(items: int, classes: int, right: float) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(3)
    truth = generator.integers(0, classes, items)
    return truth, np.where(generator.random(items) < right, truth, generator.integers(0, classes, items))


def test_fast_intervals_agree_with_resampling_items() -> None:
    truth, predicted = answers(400, 5, 0.8)
    correct = truth == predicted
    slow = metrics.bootstrap(lambda index: float(correct[index].mean()), 400, resamples=2000)
    assert metrics.accuracy_interval(correct, resamples=20000) == pytest.approx(slow, abs=0.006)
    spread = 1.96 * np.sqrt(correct.mean() * (1 - correct.mean()) / 400)
    assert metrics.accuracy_interval(correct, resamples=20000) == pytest.approx(
        (correct.mean() - spread, correct.mean() + spread), abs=0.005
    )
    one_hot = np.eye(5, dtype=bool)
    for average in AVERAGES:

        def score(index: np.ndarray, average: Average = average) -> float:
            return metrics.f1(metrics.count(truth[index], predicted[index], 5), average)

        slow = metrics.bootstrap(score, 400, resamples=2000)
        assert metrics.f1_interval(truth, predicted, average, resamples=5000) == pytest.approx(slow, abs=0.008)
        several = metrics.multilabel_f1_interval(one_hot[truth], one_hot[predicted], average, resamples=5000)
        assert several == pytest.approx(slow, abs=0.008)


def test_intervals_repeat_with_their_seed_and_hold_the_value() -> None:
    truth, predicted = answers(300, 77, 0.9)
    value = metrics.f1(metrics.count(truth, predicted, 77), "micro")
    low, high = metrics.f1_interval(truth, predicted, "micro")
    assert low <= value <= high
    first = metrics.f1_interval(truth, predicted, "macro")
    assert first == metrics.f1_interval(truth, predicted, "macro")
    assert first != metrics.f1_interval(truth, predicted, "macro", seed=1)
    narrow = metrics.f1_interval(truth, predicted, "micro", confidence=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        low, high = metrics.accuracy_interval(generator.random(200) < 0.8, seed=seed, resamples=400)
        covered += low <= 0.8 <= high
    assert 0.90 <= covered / 300 <= 0.99


def test_paired_bootstrap_tells_a_difference_from_luck() -> None:
    generator = np.random.default_rng(1)
    base = generator.random(500) < 0.8
    better = base | (generator.random(500) < 0.3)
    same = generator.permutation(base)

    def share(correct: np.ndarray) -> Any:
        return lambda index: float(correct[index].mean())

    found = metrics.paired_bootstrap(share(base), share(better), 500)
    assert found.value == pytest.approx(better.mean() - base.mean())
    assert 0 < found.interval[0] < found.value < found.interval[1]
    assert found.p < 0.01
    luck = metrics.paired_bootstrap(share(base), share(same), 500)
    assert luck.interval[0] < 0 < luck.interval[1]
    assert luck.p > 0.05
    equal = metrics.paired_bootstrap(share(base), share(base), 500)
    assert (equal.value, equal.interval, equal.p) == (0.0, (0.0, 0.0), 1.0)


@settings(max_examples=25, deadline=None)
@given(lost=st.integers(0, 12), won=st.integers(0, 12), ties=st.integers(1, 60))
def test_the_interval_of_paired_answers_is_that_of_the_score_test(lost: int, won: int, ties: int) -> None:
    items = lost + won + ties
    shares = np.linspace(0, 1, 20_001)[1:-1]

    def above(difference: float) -> float:
        """The statistic, its nuisance parameter found by trying all there are."""
        fine = shares[(shares + difference > 0) & (2 * shares + difference < 1)]
        likely = won * np.log(fine + difference) + lost * np.log(fine) + ties * np.log(1 - 2 * fine - difference)
        share = fine[likely.argmax()]
        return (won - lost - items * difference) / np.sqrt(items * (2 * share + difference - difference**2))

    low, high = metrics.tango(won, lost, items)
    assert low < (won - lost) / items < high
    assert -above(high) == pytest.approx(metrics.NORMAL, abs=0.02)
    assert above(low) == pytest.approx(metrics.NORMAL, abs=0.02)


def test_answers_that_never_differ_do_not_prove_that_they_never_will() -> None:
    right = np.ones(12)
    found = metrics.paired_mean(right, right)
    assert found.value == 0
    assert found.interval[1] == pytest.approx(metrics.NORMAL**2 / (12 + metrics.NORMAL**2), abs=1e-6)
    assert found.interval[0] == pytest.approx(-found.interval[1])
    near = metrics.paired_mean(np.full(12, 0.5), np.append(np.full(11, 0.5), 0.25))
    assert near.interval[0] <= near.value - 0.25 * found.interval[1]


def test_the_interval_of_paired_answers_holds_what_it_promises() -> None:
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(2000):
        won, lost, _ = generator.multinomial(150, (0.02, 0.03, 0.95))
        low, high = metrics.tango(int(won), int(lost), 150)
        covered += low <= -0.01 <= high
    assert 0.93 <= covered / 2000 <= 0.98


@settings(max_examples=60, deadline=None)
@given(lost=st.integers(0, 60), won=st.integers(0, 60), ties=st.integers(0, 5))
def test_mcnemar_is_the_exact_binomial_test(lost: int, won: int, ties: int) -> None:
    first = np.repeat([True, False, True], [lost, won, ties])
    second = np.repeat([False, True, True], [lost, won, ties])
    expected = binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert metrics.mcnemar(first, second) == pytest.approx(expected)
    assert metrics.mcnemar(second, first) == metrics.mcnemar(first, second)


def test_mcnemar_takes_many_items() -> None:
    first = np.arange(6000) % 2 == 0
    assert metrics.mcnemar(first, ~first) == 1.0
    assert metrics.mcnemar(first, np.ones(6000, bool)) == 0.0


def test_the_room_imports_no_torch() -> None:
    code = "import sys, lexmill.metrics; assert not {'torch', 'scipy', 'sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
