"""Tokenizers from files, and what has to agree between them and a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lexmill.data.tokenizer import check_vocabulary, fingerprint, load_tokenizer, special_ids
from lexmill.errors import UserError

TEXTS = [
    "I am STILL waiting on my card?",
    "Café über, naïve!",
    "很快，好吃 and tasty",
    "unbelievably x" * 30,
    "",
    "#@ 1.50€",
]
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "card", "Card", "##s", "很", "快"]


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", "utf-8")
    return tmp_path


def test_vocab_txt_tokenizes_like_the_tokenizer_json_of_the_same_model(minilm: Path, tmp_path: Path) -> None:
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copy(minilm / name, tmp_path / name)
    ours, theirs = load_tokenizer(tmp_path), load_tokenizer(minilm)
    for text in TEXTS:
        assert ours.encode(text).ids == theirs.encode(text).ids
        assert ours.encode(text).offsets == theirs.encode(text).offsets
    assert ours.encode("a", "b").type_ids == theirs.encode("a", "b").type_ids == [0, 0, 0, 1, 1]
    assert ours.decode(ours.encode(TEXTS[0]).ids) == theirs.decode(theirs.encode(TEXTS[0]).ids)


def test_truncation_and_padding_of_the_file_are_cleared(minilm: Path) -> None:
    tokenizer = load_tokenizer(minilm / "tokenizer.json")
    assert (tokenizer.truncation, tokenizer.padding) == (None, None)
    assert len(tokenizer.encode("word " * 600).ids) == 602


def test_lower_casing_follows_the_config_and_chinese_characters_stand_alone(bert: Path) -> None:
    assert load_tokenizer(bert).encode("Cards 很快").tokens == ["[CLS]", "card", "##s", "很", "快", "[SEP]"]
    (bert / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert load_tokenizer(bert / "vocab.txt").encode("Cards").tokens == ["[CLS]", "Card", "##s", "[SEP]"]


def test_a_fingerprint_tells_tokenizers_apart_but_not_their_truncation(bert: Path) -> None:
    tokenizer = load_tokenizer(bert)
    before = fingerprint(tokenizer)
    tokenizer.enable_truncation(16)
    assert fingerprint(tokenizer) == before
    (bert / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert fingerprint(load_tokenizer(bert)) != before


def test_a_tokenizer_with_more_ids_than_the_model_is_an_error(bert: Path) -> None:
    tokenizer = load_tokenizer(bert)
    check_vocabulary(tokenizer, 10)
    with pytest.raises(UserError, match="'快' the id 9, but the model has 9 token embeddings"):
        check_vocabulary(tokenizer, 9)
    tokenizer.add_tokens(["new"])
    with pytest.raises(UserError, match="'new'"):
        check_vocabulary(tokenizer, 10)


def test_special_ids_come_from_the_files_beside_the_tokenizer(bert: Path) -> None:
    tokenizer = load_tokenizer(bert)
    assert special_ids(tokenizer, bert) == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}
    (bert / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "card"}, "eos_token": "快"}))
    assert special_ids(tokenizer, bert) | {} == {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4, "bos": 5, "eos": 9}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b'{"model": ', "not JSON"),
        ("tokenizer.json", b"[]", "no JSON object"),
        ("tokenizer.json", b'{"model": {"type": "Magic"}}', "not a tokenizer"),
        ("tokenizer.json", b"\xff\xfe", "not UTF-8"),
        ("vocab.txt", b"a\nb\n", r"lacks '\[CLS\]'"),
        ("vocab.txt", b"caf\xe9\n", "cannot be read"),
    ],
)
def test_a_broken_file_is_an_error_that_names_it(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path / name) in (caught.value.where or "")


def test_a_missing_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs tokenizer\.json or vocab\.txt"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "nowhere")
