from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lexmill.verify.compare import TOLERANCE, compare, relative_error

finite = st.floats(-1e6, 1e6, allow_subnormal=False)
evidence = st.dictionaries(st.text(min_size=1, max_size=5), finite, min_size=1, max_size=6)


@given(evidence)
def test_evidence_equals_itself(numbers: dict[str, float]) -> None:
    assert relative_error(numbers, dict(numbers))[0] == 0


@given(evidence, st.data())
def test_a_number_that_is_off_is_found_by_name(numbers: dict[str, float], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(numbers)))
    scale = max(abs(value) for value in numbers.values()) or 1.0
    error, blamed = relative_error(numbers, numbers | {name: numbers[name] + 10 * TOLERANCE * scale})
    assert error > TOLERANCE
    assert blamed == name


@given(evidence)
def test_a_missing_name_is_a_difference(numbers: dict[str, float]) -> None:
    name = min(numbers)
    fewer = {key: value for key, value in numbers.items() if key != name}
    assert relative_error(numbers, fewer) == (math.inf, name)
    assert relative_error(fewer, numbers) == (math.inf, name)


def test_nan_agrees_with_nothing() -> None:
    assert relative_error({"a": 1.0, "b": math.nan}, {"a": 1.0, "b": math.nan}) == (math.inf, "b")


def test_infinite_numbers_differ_from_finite_ones() -> None:
    assert not relative_error({"a": math.inf}, {"a": 1.0})[0] <= TOLERANCE


def test_the_first_difference_names_probe_text_name_and_both_numbers() -> None:
    records = [{"text": "one"}, {"text": "two"}]
    check = compare("trained = served", records, [{"a": 1.0}, {"a": 2.0}], [{"a": 1.0}, {"a": 2.1}])
    assert not check.ok
    assert check.difference is not None
    assert (check.difference.probe, check.difference.text, check.difference.name) == (1, "two", "a")
    assert (check.difference.expected, check.difference.got) == (2.0, 2.1)
    assert check.max_error == pytest.approx(0.05)


def test_permuted_labels_are_a_difference() -> None:
    assert not compare("x", [{"text": "t"}], [{"a": 1.0, "b": 2.0}], [{"a": 2.0, "b": 1.0}]).ok


def test_too_few_answers_are_a_difference() -> None:
    assert not compare("x", [{"text": "t"}], [{"a": 1.0}], []).ok
