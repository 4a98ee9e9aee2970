"""Spans taken out of running text, and texts that do not see each other: what is drawn, learnt and refused."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.train.parts import rows, tiny_bert, tiny_llama, write_rows
from tests.train.parts import tokenizer as words
from tokenizers import Tokenizer

from lexmill import models
from lexmill.data import collate
from lexmill.data.batch import Batch, Example
from lexmill.data.draws import keys
from lexmill.data.tokenizer_training import TokenizerConfig, train_tokenizer, write_tokenizer
from lexmill.errors import UserError
from lexmill.fit import DataConfig, FitConfig, Watch, fit
from lexmill.models import Model, ModelConfig, families
from lexmill.tasks.inputs import dense, packed
from lexmill.tasks.pretrain import Pretrain, PretrainOptions
from lexmill.train import TrainConfig, accumulate
from lexmill.train.step import Manner

ROWS = [{"text": row["text"]} for row in rows(12)]
SIZE = 400
T5 = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
SPECIAL = {"t5": "unigram", "bert": "wordpiece", "gpt2": "bpe"}


@cache
def tokenizer(special: str = "t5") -> Tokenizer:
    config = TokenizerConfig(SPECIAL[special], SIZE, special)  # pyright: ignore[reportArgumentType]
    return train_tokenizer([row["text"] for row in rows(300)], config)


def tiny_t5(**changes: Any) -> Model:
    config = families.find("t5").read_config({**T5, "vocab_size": SIZE, "dropout_rate": 0.0, **changes})
    assert isinstance(config, ModelConfig)
    return models.init(config, "t5", 0)


def pretrain(model: Model | None = None, known: Tokenizer | None = None, **options: Any) -> Pretrain:
    options = {"objective": "span", "max_length": 32, **options}
    task = Pretrain.from_records([], {"text": "text"}, PretrainOptions(**options)).for_tokenizer(known or tokenizer())
    if model is not None:
        torch.manual_seed(1)
        task.attach(model)
    return task


def blocks(task: Pretrain, known: Tokenizer | None = None, data: Sequence[dict[str, str]] = ROWS) -> list[Example]:
    return list(task.regroup(task.encode(data, known or tokenizer(), labelled=True)))


def sequences(batch: Batch, name: str) -> list[list[int]]:
    stream = batch.streams[name]
    return [part.tolist() for part in np.split(stream.ids, stream.offsets[1:-1])]


def put_together(source: list[int], target: list[int], sentinels: Sequence[int]) -> list[int]:
    taken: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token in sentinels:
            taken[token] = []
        else:
            taken[list(taken)[-1]].append(token)
    return [token for one in source[:-1] for token in taken.get(one, [one])]


@given(st.integers(0, 2**31), st.integers(0, 50), st.integers(12, 80), st.sampled_from(["joined", "separate"]))
def test_source_and_target_put_together_are_the_text_for_every_draw(seed, epoch, max_length, documents) -> None:
    task = pretrain(max_length=max_length, documents=documents)
    batch = collate(blocks(task))
    drawn = task.draw(batch, keys(np.arange(batch.num_examples), seed, epoch))
    known = task.known
    both = zip(sequences(drawn, "source"), sequences(drawn, "target"), strict=True)
    assert [put_together(*one, known.sentinels) for one in both] == sequences(batch, "source")
    assert drawn.streams["target"].example.tolist() == batch.streams["source"].example.tolist()
    assert drawn.labels["lm"].tolist() == drawn.streams["target"].ids.tolist()
    assert drawn.masks["lm"].all()
    plain = set(batch.streams["source"].ids.tolist())
    assert not plain & set(known.sentinels)


def test_the_share_of_noise_and_the_length_of_spans_are_those_of_the_paper() -> None:
    data = [{"text": row["text"]} for row in rows(300)]
    task = pretrain(max_length=256)
    batch = collate(blocks(task, data=data))
    drawn = task.draw(batch, keys(np.arange(batch.num_examples), 0, 0))
    spans = int(np.isin(drawn.streams["target"].ids, task.known.sentinels).sum())
    hidden = drawn.streams["target"].num_tokens - spans - batch.num_examples
    assert hidden / batch.num_tokens == pytest.approx(0.15, abs=0.002)
    assert hidden / spans == pytest.approx(3.0, abs=0.1)


def test_what_is_taken_out_is_a_function_of_seed_epoch_and_example_however_a_batch_is_cut() -> None:
    task = pretrain(documents="separate")
    found = blocks(task)
    index = np.arange(len(found))

    def drawn(part: np.ndarray, *key: int) -> list[list[int]]:
        return sequences(task.draw(collate([found[i] for i in part]), keys(np.asarray(part), *key)), "target")

    whole = drawn(index, 0, 0)
    assert whole == drawn(index[:3], 0, 0) + drawn(index[3:], 0, 0)
    assert whole != drawn(index, 0, 1)
    assert whole != drawn(index, 1, 0)


@pytest.mark.parametrize("documents", ["joined", "separate"])
def test_packed_equals_padded_and_three_parts_equal_one(documents) -> None:
    found = {}
    for way in ("one", "three", "dense"):
        model = tiny_t5(tie_word_embeddings=False).double().train()
        task = pretrain(model, documents=documents)
        examples = blocks(task)
        parts = [range(len(examples))] if way != "three" else [range(1), range(1, 3), range(3, len(examples))]
        batches = [task.draw(collate([examples[i] for i in p]), keys(np.array(p), 5)) for p in parts]
        manner = Manner(arrange=dense) if way == "dense" else Manner()
        losses, _ = accumulate(model, task, batches, seed=0, manner=manner)
        grads = torch.cat([p.grad.to_dense().flatten() for p in model.parameters() if p.grad is not None])
        found[way] = (losses["lm"], grads)
    for way in ("three", "dense"):
        assert found[way][0] == pytest.approx(found["one"][0], rel=1e-10)
        assert float((found[way][1] - found["one"][1]).norm() / found["one"][1].norm()) <= 1e-10


def test_scores_of_spans_do_not_depend_on_what_else_is_in_the_batch(monkeypatch) -> None:
    model = tiny_t5().eval()
    task = pretrain(model)
    data = [{"text": " ".join(row["text"] for row in ROWS)}, *ROWS]
    with torch.inference_mode():
        together = task.answer(model, collate(task.encode(data, tokenizer(), labelled=True)), data, tokenizer())
        assert len(together[0].nll) > 3
        monkeypatch.setattr("lexmill.tasks.pretrain._SCORED_AT_ONCE", 40)
        for row, one in zip(data, together, strict=True):
            alone = task.encode([row], tokenizer(), labelled=True)
            [again] = task.answer(model, collate(alone), [row], tokenizer())
            np.testing.assert_allclose(again.nll, one.nll, rtol=1e-4)
            assert again.tokens.tolist() == one.tokens.tolist()


def apart(objective: str) -> tuple[Pretrain, Model, Tokenizer]:
    known = tokenizer() if objective == "span" else words()
    model = {"span": tiny_t5, "causal": tiny_llama, "masked": tiny_bert}[objective]()
    return pretrain(model, known, objective=objective, documents="separate"), model.eval(), known


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_the_logits_of_a_text_are_the_same_alone_and_beside_others_in_a_block(objective) -> None:
    task, model, known = apart(objective)
    found = blocks(task, known)
    assert max(len(one.streams["source"]) for one in found) > 1

    def hidden(examples: list[Example]) -> torch.Tensor:
        stream = collate(examples).streams["source"]
        ids, positions, types, layout = packed(stream, model.device)
        return model(ids, positions, layout, types=types)["lm"]

    with torch.inference_mode():
        together = hidden(found)
        alone = [hidden([Example({"source": (tokens,)})]) for one in found for tokens in one.streams["source"]]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
        joined = collate(blocks(pretrain(None, known, objective=objective), known)).streams["source"]
        assert (
            joined.num_tokens != len(together) or (joined.positions != collate(found).streams["source"].positions).any()
        )


def test_every_token_of_a_separate_text_is_foreseen_once_from_its_own_text_alone() -> None:
    task, _, known = apart("causal")
    batch = collate(blocks(task, known))
    drawn = task.draw(batch, keys(np.arange(batch.num_examples), 0))
    assert drawn.masks["lm"].all()
    texts = [known.encode(row["text"], add_special_tokens=False).ids for row in ROWS]
    assert drawn.labels["lm"].tolist() == [token for ids in texts for token in [*ids, 102]]
    assert drawn.streams["source"].ids.tolist() == [token for ids in texts for token in [102, *ids]]
    begins = set(drawn.streams["source"].offsets[:-1].tolist())
    assert set(np.flatnonzero(drawn.streams["source"].ids == 102).tolist()) <= begins


def test_separate_texts_of_a_masked_model_each_begin_as_texts_do() -> None:
    task, _, known = apart("masked")
    parts = sequences(collate(blocks(task, known)), "source")
    assert all(part[0] == 101 and 101 not in part[1:] for part in parts)
    texts = [known.encode(row["text"], add_special_tokens=False).ids for row in ROWS]
    assert [t for part in parts for t in part[1:]] == [token for ids in texts for token in [*ids, 102]]


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (tiny_llama, {}, "needs an encoder-decoder"),
        (tiny_bert, {}, "needs an encoder-decoder"),
        (tiny_t5, {"objective": "causal"}, "does not learn by the causal"),
    ],
)
def test_a_model_of_the_wrong_kind_is_refused(make, options, match) -> None:
    with pytest.raises(UserError, match=match):
        pretrain(make(), **options)


def test_an_encoder_decoder_does_not_learn_by_masks() -> None:
    with pytest.raises(UserError, match="does not learn by the masked"):
        pretrain(tiny_t5(), tokenizer("bert"), objective="masked")


@pytest.mark.parametrize(
    ("special", "options", "match"),
    [
        ("bert", {}, "no sentinels"),
        ("t5", {"max_length": 8192}, "100 sentinels cannot stand for 410 spans"),
        ("t5", {"whole_words": True}, "nothing is masked"),
        ("gpt2", {"objective": "causal", "mask_share": 0.2}, "nothing is masked"),
        ("gpt2", {"objective": "causal", "mean_span": 2.0}, "no spans"),
    ],
)
def test_what_could_not_act_is_refused(special, options, match) -> None:
    with pytest.raises(UserError, match=match):
        pretrain(None, tokenizer(special), **options)


def test_the_state_gives_the_same_task_again() -> None:
    task = pretrain(mask_share=0.3, mean_span=2.0, documents="separate")
    again = Pretrain.from_state(json.loads(json.dumps(task.state())))
    assert again.state() == task.state()
    assert again.known == task.known


@pytest.fixture
def _unchecked_shapes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("LEXMILL_CACHE", str(tmp_path / "cache"))
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


class _PulledError(Exception):
    """The plug."""


class _PlugAt:
    """A sink that ends the run at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def emit(self, event: Mapping[str, Any]) -> None:
        if event["step"] == self.step:
            raise _PulledError

    def close(self) -> None:
        return


@pytest.mark.usefixtures("_unchecked_shapes")
def test_a_t5_learns_from_nothing_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    model = tmp_path / "model"
    data = write_rows(tmp_path / "a.jsonl", rows(300)[:240])
    test = write_rows(tmp_path / "b.jsonl", rows(300)[240:])
    write_tokenizer(data, model, TokenizerConfig("unigram", SIZE))
    (model / "config.json").write_text(json.dumps(T5))
    asked = FitConfig(
        DataConfig(data, test=test),
        model=str(model),
        init="random",
        task="pretrain",
        options={"max_length": 64, "objective": "span"},
        train=TrainConfig(epochs=6, batch_size=8, learning_rate=1e-2, checkpoint_every=5),
    )
    whole = fit(asked, tmp_path / "out")
    assert whole.test is not None
    assert whole.test["perplexity"] < 60  # of 400 tokens
    with pytest.raises(_PulledError):
        fit(asked, tmp_path / "again", watch=Watch(sinks=[_PlugAt(7)]))
    again = fit(asked, tmp_path / "again", resume=True)
    assert again.artifact.manifest.weights == whole.artifact.manifest.weights
    assert again.training["final_loss"] == whole.training["final_loss"]
