"""Changed copies of rows: what each edit does, and what is never done."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lexmill.data.augment import MARK, Editor, augment, read_synonyms, rewrite
from lexmill.errors import UserError

TEXT = "why was my card payment declined yesterday"


def words(text: str) -> list[str]:
    return sorted(text.split())


def test_swapped_words_stand_beside_where_they_stood() -> None:
    found = Editor(("swap",), 0.1).copy(TEXT, 0, 0)
    assert found is not None
    assert found[1] == "swap"
    assert words(found[0]) == words(TEXT)
    moved = [at for at, (a, b) in enumerate(zip(found[0].split(), TEXT.split(), strict=True)) if a != b]
    assert len(moved) == 2
    assert moved[1] - moved[0] == 1


def test_deleting_takes_a_share_of_the_words_and_leaves_one() -> None:
    found = Editor(("delete",), 0.4).copy(TEXT, 0, 0)
    assert found is not None
    assert len(found[0].split()) == 4
    assert Editor(("delete",), 1.0).copy("two words", 0, 0) is not None
    assert Editor(("delete",), 1.0).copy("one", 0, 0) is None


def test_a_slip_of_the_finger_hits_a_neighbouring_key_in_the_same_case() -> None:
    found = Editor(("keyboard",), 0.1).copy("PAYMENT", 0, 0)
    assert found is not None
    changed = [(a, b) for a, b in zip("PAYMENT", found[0], strict=True) if a != b]
    assert len(changed) == 1
    (was, now) = changed[0]
    assert now.isupper()
    assert any(
        abs(row.find(was.lower()) - row.find(now.lower())) == 1 for row in ("qwertyuiop", "asdfghjkl", "zxcvbnm")
    )
    assert Editor(("keyboard",), 1.0).copy("a in to", 0, 0) is None


def test_synonyms_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text("declined, refused, rejected\n\n卡, 银行卡\n", "utf-8")
    editor = Editor(("synonym",), 0.1, synonyms=read_synonyms(file))
    found = editor.copy(TEXT, 0, 0)
    assert found is not None
    assert found[0] in (TEXT.replace("declined", "refused"), TEXT.replace("declined", "rejected"))
    assert editor.copy("我的卡丢了", 0, 0) == ("我的银行卡丢了", "synonym")
    assert editor.copy("nothing known", 0, 0) is None


@pytest.mark.parametrize(("content", "says"), [("alone\n", "words.txt:1"), ("\n", "holds no words")])
def test_a_wrong_file_of_synonyms_is_refused(content: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_text(content, "utf-8")
    with pytest.raises(UserError) as caught:
        read_synonyms(file)
    assert says in str(caught.value)


@given(st.text(max_size=40), st.integers(0, 5))
def test_a_copy_is_another_text_and_always_the_same_one(text: str, number: int) -> None:
    editor = Editor(("swap", "delete", "keyboard"), 0.3, seed=1)
    found = editor.copy(text, 3, number)
    assert found == editor.copy(text, 3, number)
    if found is not None:
        assert found[0] != text
        assert found[0].strip()


def test_rows_are_followed_by_their_copies_with_the_same_label() -> None:
    rows = [{"text": TEXT, "label": "card"}, {"text": "hm", "label": "other"}, {"text": None, "label": "none"}]
    found = list(augment(rows, "text", Editor(("swap", "delete"), 0.2), 3))
    assert [row["label"] for row in found if row[MARK] is None] == ["card", "other", "none"]
    copies = [row for row in found if row[MARK] is not None]
    assert 1 < len(copies) <= 3
    assert all(row["label"] == "card" and row["text"] != TEXT for row in copies)
    assert len({row["text"] for row in copies}) == len(copies)


def test_rewriting_goes_through_whoever_rewrites_in_chunks() -> None:
    rows = [{"text": text} for text in ("one", "two", "", "three")]
    sizes: list[int] = []

    def louder(texts: list[str]) -> list[str]:
        sizes.append(len(texts))
        return [text.upper() if text != "two" else text for text in texts]

    found = list(rewrite(rows, "text", louder, "louder", chunk=2))
    assert [row["text"] for row in found] == ["one", "ONE", "two", "", "three", "THREE"]
    assert [row[MARK] for row in found] == [None, "louder", None, None, None, "louder"]
    assert sizes == [2, 1]


def test_an_unknown_edit_and_synonyms_without_words_are_refused() -> None:
    with pytest.raises(UserError, match="unknown edit"):
        Editor(("shuffle",), 0.1)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="need a file of words"):
        Editor(("synonym",), 0.1)
