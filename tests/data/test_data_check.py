"""What `check` finds in data, with places."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lexmill.data.bundled import banking77
from lexmill.data.check import DataReport, Finding, check
from lexmill.data.columns import guess
from lexmill.data.sources import Source, open_source
from lexmill.errors import UserError


def source(path: Path, rows: list[dict[str, Any]]) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return open_source(path)


def report(
    tmp_path: Path, train: list[dict[str, Any]], test: list[dict[str, Any]] | None = None, **more: Any
) -> DataReport:
    trained = source(tmp_path / "train.jsonl", train)
    tested = source(tmp_path / "test.jsonl", test) if test is not None else None
    given = more.pop("given", None)
    return check(trained, tested, guess(trained.columns(), trained.peek(), given), **more)


def finding(result: DataReport, code: str) -> Finding:
    found = [finding for finding in result.findings if finding.code == code]
    assert len(found) == 1, result.lines()
    return found[0]


def codes(result: DataReport) -> set[str]:
    return {finding.code for finding in result.findings}


def rows(*pairs: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"text": text, "label": label} for text, label in pairs]


CLEAN = rows(*((f"text {n}", "ab"[n % 2]) for n in range(20)))


def test_clean_data_has_no_findings(tmp_path: Path) -> None:
    result = report(tmp_path, CLEAN, rows(("other", "a")))
    assert result.findings == ()
    assert result.ok
    assert result.train.rows == 20
    assert result.train.labels == {"label": {"a": 10, "b": 10}}
    assert result.test is not None
    assert result.test.rows == 1


def test_duplicates_and_conflicts_are_told_apart(tmp_path: Path) -> None:
    extra = rows(("text 0", "a"), ("text 1", "a"), ("text 1", "a"), ("text 0", "a"))
    result = report(tmp_path, CLEAN + extra)
    path = tmp_path / "train.jsonl"
    duplicates = finding(result, "duplicates")
    assert duplicates.count == 3
    assert duplicates.examples == (
        f"{path}:21 repeats {path}:1",
        f"{path}:23 repeats {path}:22",
        f"{path}:24 repeats {path}:1",
    )
    conflicts = finding(result, "conflicts")
    assert conflicts.count == 1
    assert conflicts.examples == (f"{path}:2 says 'b' but {path}:22 says 'a'",)


def test_overlap_and_labels_unseen_in_training_are_found(tmp_path: Path) -> None:
    result = report(tmp_path, CLEAN, rows(("text 3", "b"), ("new", "c"), ("text 3", "b"), ("new too", "a")))
    assert finding(result, "overlap").count == 2
    assert finding(result, "overlap").examples[0] == f"{tmp_path / 'test.jsonl'}:1 is also {tmp_path / 'train.jsonl'}:4"
    unseen = finding(result, "unseen_label")
    assert (unseen.severity, unseen.examples) == ("error", ("'c', 1 test rows",))


def test_empty_and_missing_texts_and_labels_are_found(tmp_path: Path) -> None:
    bad: list[dict[str, Any]] = [{"text": " ", "label": "a"}, {"text": "", "label": "b"}, {"label": "a"}, {"text": "x"}]
    result = report(tmp_path, CLEAN + bad)
    assert finding(result, "empty_text").count == 2
    assert finding(result, "missing_text").examples == (f"{tmp_path / 'train.jsonl'}:23: no 'text'",)
    assert finding(result, "missing_label").count == 1
    assert not codes(result) & {"duplicates", "conflicts"}
    assert not result.ok


def test_over_long_texts_are_counted_in_characters_and_tokens(tmp_path: Path, minilm: Path) -> None:
    from lexmill.data.tokenizer import load_tokenizer

    long = rows(("word " * 100, "a"))
    result = report(tmp_path, CLEAN + long, tokenizer=load_tokenizer(minilm), max_tokens=64, max_chars=200)
    assert "102 tokens: word word" in finding(result, "cut_text").examples[0]
    assert finding(result, "long_text").examples[0].startswith(f"{tmp_path / 'train.jsonl'}:21: 500 characters")
    assert result.train.tokens is not None
    assert (result.train.tokens.p50, result.train.tokens.max) == (4, 102)


def test_one_class_only_is_an_error(tmp_path: Path) -> None:
    assert finding(report(tmp_path, rows(("a", "x"), ("b", "x"))), "one_class").severity == "error"


def test_labels_with_few_rows_are_told(tmp_path: Path) -> None:
    assert finding(report(tmp_path, CLEAN + rows(("c", "c"))), "rare_labels").examples == ("'c', 1 rows",)


def test_lists_of_labels_are_counted_one_by_one_and_compared_as_sets(tmp_path: Path) -> None:
    data = [
        {"text": "a", "labels": ["x", "y"]},
        {"text": "a", "labels": ["y", "x"]},
        {"text": "a", "labels": ["y"]},
        {"text": "b", "labels": []},
    ]
    result = report(tmp_path, data)
    assert result.train.labels == {"labels": {"y": 3, "x": 2}}
    assert finding(result, "duplicates").count == 1
    assert finding(result, "conflicts").examples[0].endswith("says 'y'")
    assert "missing_label" not in codes(result)


def test_several_label_columns_are_checked_each_on_its_own(tmp_path: Path) -> None:
    data = [
        {"text": "a", "label": "x", "domain": "p"},
        {"text": "a", "domain": "q"},
        {"text": "b", "label": "y"},
    ]
    result = report(tmp_path, data, given={"label": ["label", "domain"]})
    assert finding(result, "conflicts").message.endswith("'domain'")
    assert finding(result, "conflicts").count == 1


def test_pairs_are_compared_as_pairs(tmp_path: Path) -> None:
    data = [{"text_a": a, "text_b": b, "label": n} for a, b, n in [("ab", "c", 0), ("a", "bc", 1), ("ab", "c", 0)]]
    result = report(tmp_path, data)
    assert finding(result, "duplicates").count == 1
    assert "conflicts" not in codes(result)


def test_skipped_rows_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in CLEAN) + "[]\n")
    with pytest.raises(UserError, match=r"a\.jsonl:21"):
        check(open_source(path), None, guess(["text", "label"], open_source(path).peek(5)))
    data = open_source(path, skip_bad=True)
    result = check(data, None, guess(data.columns(), data.peek()))
    assert finding(result, "skipped").count == 1
    assert result.train.skipped == 1


def test_a_report_is_json_and_text(tmp_path: Path) -> None:
    result = report(tmp_path, CLEAN + rows(("text 0", "a")), rows(("text 0", "zz")))
    assert json.loads(json.dumps(result.to_dict()))["findings"][0]["code"] == "unseen_label"
    lines = result.lines()
    assert lines[0].endswith("train.jsonl: 21 rows, 2 labels in 'label'")
    assert any(line.startswith("error: 1 labels in 'label'") for line in lines)


def test_banking77_is_as_published() -> None:
    train, test = (open_source(path) for path in banking77())
    result = check(train, test, guess(train.columns(), train.peek()))
    assert result.test is not None
    assert (result.train.rows, result.test.rows) == (10_003, 3_080)
    assert len(result.train.labels["label"]) == 77
    assert result.ok
