"""Tokenizers trained on real text: sizes, special tokens, what transformers makes of them, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.train.parts import rows, write_rows

from lexmill import api
from lexmill.data.tokenizer import load_tokenizer
from lexmill.data.tokenizer_training import STYLES, TokenizerConfig, train_tokenizer, write_tokenizer
from lexmill.errors import UserError

TEXTS = [row["text"] for row in rows(400)]
KINDS = [("bpe", 400, "gpt2"), ("wordpiece", 300, "bert"), ("unigram", 300, "t5"), ("bpe", 400, "roberta")]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("kind", "size", "special"), KINDS)
def test_a_trained_tokenizer_has_the_size_asked_for_and_loads_in_transformers(kind, size, special, tmp_path) -> None:
    from transformers import AutoTokenizer

    data = write_rows(tmp_path / "train.jsonl", rows(400))
    found = write_tokenizer(data, tmp_path / "tok", TokenizerConfig(kind, size, special))
    ours = load_tokenizer(tmp_path / "tok")
    assert ours.get_vocab_size() == size
    assert (found.texts, found.bytes) == (400, sum(len(text.encode()) for text in TEXTS))
    assert 1 < found.bytes_per_token < 6
    json.dumps(found.to_dict())
    theirs = AutoTokenizer.from_pretrained(tmp_path / "tok")
    for text in [*TEXTS[:20], "", "Ünï ¿—", "a b"]:
        assert theirs(text)["input_ids"] == ours.encode(text).ids
        if kind == "bpe":
            assert ours.decode(ours.encode(text).ids) == text
    for role, token in STYLES[special].roles.items():
        assert getattr(theirs, f"{role}_token") == token
        assert ours.encode(token, add_special_tokens=False).ids == [ours.token_to_id(token)]
    pair = theirs(TEXTS[0], TEXTS[1])["input_ids"]
    assert pair == ours.encode(TEXTS[0], TEXTS[1]).ids


def test_special_tokens_have_the_first_ids_in_the_order_of_their_family() -> None:
    tokenizer = train_tokenizer(TEXTS, TokenizerConfig("bpe", 400, "roberta"))
    assert [tokenizer.id_to_token(i) for i in range(5)] == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    encoded = train_tokenizer(TEXTS, TokenizerConfig("wordpiece", 300)).encode("My CARD", "pin")
    assert (encoded.tokens[0], encoded.tokens[-1]) == ("[CLS]", "[SEP]")
    assert (encoded.type_ids[0], encoded.type_ids[-1]) == (0, 1)
    assert "card" in encoded.tokens


def test_the_same_text_gives_the_same_tokenizer() -> None:
    one, two = (train_tokenizer(TEXTS, TokenizerConfig("bpe", 350)).to_str() for _ in range(2))
    assert one == two


def test_long_texts_are_cut_at_line_ends_without_losing_any() -> None:
    book = "\n".join(TEXTS * 5) + "x " * 50_000
    whole = train_tokenizer([book], TokenizerConfig("bpe", 350))
    assert whole.decode(whole.encode(TEXTS[0]).ids) == TEXTS[0]


@pytest.mark.parametrize(
    ("config", "texts", "match"),
    [
        (TokenizerConfig("bpe", 5000), TEXTS[:20], "no more than"),
        (TokenizerConfig("wordpiece", 5000), TEXTS[:20], "no more than"),
        (TokenizerConfig("bpe", 100), TEXTS, "too few"),
        (TokenizerConfig("bpe", 300), ["", ""], "no text"),
        (TokenizerConfig("wordpiece", 300, "gpt2"), TEXTS, "unknown"),
        (TokenizerConfig("unigram", 5000), TEXTS[:5], "no more than|no tokenizer"),
    ],
)
def test_what_cannot_be_learnt_is_said(config, texts, match) -> None:
    with pytest.raises(UserError, match=match):
        train_tokenizer(texts, config)


CHINESE = ["".join(chr(0x4E00 + (i * 7 + j) % 700) for j in range(40)) for i in range(120)]


def test_as_many_characters_have_a_token_as_there_is_room_for() -> None:
    """Single ideographs are words of their own, so that nothing but them fills a WordPiece vocabulary."""
    assert train_tokenizer(CHINESE, TokenizerConfig("wordpiece", 600)).get_vocab_size() == 600
    with pytest.raises(UserError, match="no more than 705 tokens"):
        train_tokenizer(CHINESE, TokenizerConfig("wordpiece", 2000))
    assert train_tokenizer(CHINESE, TokenizerConfig("wordpiece", 705)).get_vocab_size() == 705


def test_too_few_unigrams_for_all_characters_ask_for_more() -> None:
    with pytest.raises(UserError, match="a larger vocab_size"):
        train_tokenizer(CHINESE, TokenizerConfig("unigram", 300))


def test_fewer_tokens_are_taken_where_that_is_allowed() -> None:
    tokenizer = train_tokenizer(TEXTS[:20], TokenizerConfig("wordpiece", 5000), fewer=True)
    assert 30 < tokenizer.get_vocab_size() < 5000


def test_several_columns_are_read_and_lists_of_texts(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"source": text, "target": [text.upper(), text[::-1]], "other": "#"} for text in TEXTS[:50]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    both = ("source", "target")
    found = api.tokenizer(data, out=tmp_path / "both", kind="bpe", vocab_size=300, text=both)
    assert found.texts == 150
    alone = api.tokenizer(data, out=tmp_path / "one", kind="bpe", vocab_size=300, text="source")
    assert alone.texts == 50
    with pytest.raises(UserError, match="targte"):
        api.tokenizer(data, out=tmp_path / "none", text=("source", "targte"))
    assert not (tmp_path / "none").exists()


def test_an_existing_directory_is_refused_and_a_failed_run_leaves_none(tmp_path) -> None:
    data = write_rows(tmp_path / "train.jsonl", rows(20))
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        write_tokenizer(data, tmp_path / "there", TokenizerConfig("bpe", 300))
    with pytest.raises(UserError, match="no more than"):
        write_tokenizer(data, tmp_path / "new", TokenizerConfig("bpe", 5000))
    assert {path.name for path in tmp_path.iterdir()} == {"train.jsonl", "there"}
