"""Columns by what the user gave, by name, and by shape."""

from __future__ import annotations

from typing import Any

import pytest

from lexmill.data.columns import Columns, Role, guess
from lexmill.data.sources import Row
from lexmill.errors import UserError


def found(*values: dict[str, Any], given: dict[str, Any] | None = None) -> Columns:
    rows = [Row(line, value) for line, value in enumerate(values, 1)]
    return guess(list(dict.fromkeys(name for value in values for name in value)), rows, given)


@pytest.mark.parametrize(
    ("names", "roles"),
    [
        (("text", "label"), {"text": "text", "label": "label"}),
        (("id", "Utterance", "Intent"), {"text": "Utterance", "label": "Intent"}),
        (("label", "sentence"), {"text": "sentence", "label": "label"}),
        (("text_a", "text_b", "label"), {"text": "text_a", "text_pair": "text_b", "label": "label"}),
        (("premise", "hypothesis", "label"), {"text": "premise", "text_pair": "hypothesis", "label": "label"}),
        (("title", "review", "sentiment"), {"text": "review", "label": "sentiment"}),
        (("标签", "文本"), {"text": "文本", "label": "标签"}),
        (("text", "label", "domain"), {"text": "text", "label": "label"}),
    ],
)
def test_columns_are_known_by_their_names(names: tuple[str, ...], roles: dict[str, str]) -> None:
    columns = found(dict.fromkeys(names, "some words"))
    assert dict(columns) == roles
    assert set(columns.how.values()) == {"by name"}


def test_columns_with_strange_names_are_known_by_their_shape() -> None:
    rows = [{"n": str(n), "aa": f"a rather long text number {n}", "bb": "xyz"[n % 3]} for n in range(30)]
    columns = found(*rows)
    assert dict(columns) == {"text": "aa", "label": "bb"}
    assert columns.lines() == [
        "text: column 'aa' (its texts are the longest)",
        "label: column 'bb' (it has 3 distinct values in the first 30 rows)",
    ]


def test_given_columns_win_and_are_shown_as_given() -> None:
    columns = found({"text": "a", "other": "b", "label": "c", "mood": "d"}, given={"text": "other", "label": "mood"})
    assert dict(columns) == {"text": "other", "label": "mood"}
    assert columns.how["label"] == "given"


def test_several_label_columns_can_be_given() -> None:
    columns = found({"text": "a", "label": "b", "domain": "c"}, given={"label": ["label", "domain"]})
    assert columns.labels == ("label", "domain")
    assert columns["label.domain"] == "domain"


def test_lists_of_labels_are_seen_to_be_multi_label() -> None:
    columns = found({"text": "a", "labels": ["x", "y"]})
    assert columns["label"] == "labels"
    assert columns.multi_label
    assert not found({"text": "a", "label": "x"}).multi_label


def test_unlabelled_data_has_no_label_column() -> None:
    assert dict(found({"text": "a"}, {"text": "b"})) == {"text": "text"}


def test_an_unknown_given_column_names_the_nearest_one() -> None:
    with pytest.raises(UserError, match="did you mean 'label'") as caught:
        found({"text": "a", "label": "b"}, given={"label": "lable"})
    assert caught.value.where == "--label"


def test_data_without_text_is_an_error_that_lists_the_columns() -> None:
    with pytest.raises(UserError, match="the columns are: n, label"):
        found({"n": 1, "label": "b"})


QUESTIONS = (Role("question", ("question", "frage")), Role("context", ("passage",)), Role("answers", input=False))


def test_a_task_may_want_other_columns() -> None:
    rows = [Row(1, {"Frage": "Wer?", "passage": "Ada.", "gold": "Ada"})]
    columns = guess(["Frage", "passage", "gold"], rows, {"answers": "gold"}, QUESTIONS)
    assert dict(columns) == {"question": "Frage", "context": "passage", "answers": "gold"}
    assert columns.texts == ("Frage", "passage")
    assert columns.labels == ()


def test_a_wanted_column_that_no_name_fits_is_an_error_with_the_flag_to_give() -> None:
    with pytest.raises(UserError, match="no column looks like 'answers'") as caught:
        guess(["question", "passage"], [], None, QUESTIONS)
    assert caught.value.hint == "name it with --column answers=NAME; the columns are: question, passage"


def test_a_column_for_nothing_is_an_error() -> None:
    with pytest.raises(UserError, match="has no column 'label'"):
        guess(["question", "passage", "gold"], [], {"label": "gold"}, QUESTIONS)
