"""Pretraining: what is foreseen of a text, how it is hidden, and that no way of cutting changes a score."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.train.parts import rows, tiny_bert, tiny_llama, tokenizer

from lexmill import models
from lexmill.data import collate
from lexmill.data.draws import keys
from lexmill.errors import UserError
from lexmill.models import Model, RecurrentConfig
from lexmill.nn import Packed
from lexmill.tasks.inputs import dense
from lexmill.tasks.pretrain import Pretrain, PretrainOptions
from lexmill.train import accumulate
from lexmill.train.step import Manner

ROWS = [{"text": row["text"]} for row in rows(12)]
LONG = [{"text": " ".join(row["text"] for row in rows(40))}]


def pretrain(model: Model | None = None, **options) -> Pretrain:
    task = Pretrain.from_records([], {"text": "text"}, PretrainOptions(**options)).for_tokenizer(tokenizer())
    if model is not None:
        torch.manual_seed(1)
        task.attach(model)
    return task


def tiny_lstm() -> Model:
    return models.init(RecurrentConfig(30_522, "lstm", 8, 12, bidirectional=False, dropout=0.0), "lstm", 0)


def blocks(task: Pretrain, data=ROWS):
    return list(task.regroup(task.encode(data, tokenizer(), labelled=True)))


def test_blocks_hold_all_texts_with_the_end_token_between_them() -> None:
    task = pretrain(max_length=16)
    found = blocks(task)
    ids = np.concatenate([b.streams["source"][0].ids for b in found]).tolist()
    expected = [t for row in ROWS for t in [*tokenizer().encode(row["text"], add_special_tokens=False).ids, 102]]
    assert ids == expected
    assert {len(b.streams["source"][0].ids) for b in found[:-1]} == {16}


def test_every_block_of_a_masked_model_begins_as_its_texts_do() -> None:
    found = blocks(pretrain(objective="masked", max_length=16))
    assert all(b.streams["source"][0].ids[0] == 101 for b in found)
    inner = np.concatenate([b.streams["source"][0].ids[1:] for b in found]).tolist()
    assert 101 not in inner
    assert inner.count(102) == len(ROWS)


def test_causal_labels_are_the_next_tokens() -> None:
    task = pretrain(max_length=16)
    batch = collate(blocks(task))
    drawn = task.draw(batch, keys(np.arange(batch.num_examples), 0))
    stream = drawn.streams["source"]
    for start, end in zip(stream.offsets[:-1], stream.offsets[1:], strict=True):
        assert drawn.labels["lm"][start : end - 1].tolist() == stream.ids[start + 1 : end].tolist()
        assert drawn.masks["lm"][start:end].tolist() == [True] * (end - start - 1) + [False]


@pytest.mark.parametrize("whole_words", [False, True])
def test_masks_are_a_function_of_seed_epoch_and_example_however_a_batch_is_cut(whole_words) -> None:
    task = pretrain(objective="masked", max_length=32, whole_words=whole_words)
    found = blocks(task)
    index = np.arange(len(found))

    def drawn(part, *key):
        batch = task.draw(collate([found[i] for i in part]), keys(np.asarray(part), *key))
        return batch.streams["source"].ids.tolist(), batch.masks["lm"].tolist()

    whole = drawn(index, 0, 0)
    cut = [drawn(part, 0, 0) for part in (index[:3], index[3:])]
    assert whole == tuple(a + b for a, b in zip(*cut, strict=True))
    assert whole != drawn(index, 0, 1)
    assert whole != drawn(index, 1, 0)
    plain = collate(found).streams["source"].ids
    assert not np.isin(plain[np.array(whole[1])], [101, 102]).any()
    if whole_words:
        pieces = [str(tokenizer().id_to_token(i)).startswith("##") for i in plain.tolist()]
        mask = np.array(whole[1])
        inside = np.array(pieces) & (collate(found).streams["source"].positions > 1)
        assert (mask[np.flatnonzero(inside)] == mask[np.flatnonzero(inside) - 1]).all()


CASES = [
    (tiny_llama, {"objective": "causal"}),
    (tiny_bert, {"objective": "masked", "mask_share": 0.4}),
    (tiny_lstm, {"objective": "causal"}),
]


@pytest.mark.parametrize(("make", "options"), CASES)
def test_packed_equals_padded_and_three_parts_equal_one(make, options) -> None:
    found = {}
    for way in ("one", "three", "dense"):
        model = make().double().train()
        task = pretrain(model, max_length=24, **options)
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


def test_a_score_is_the_sum_over_all_tokens_each_foreseen_once_from_its_window() -> None:
    model = tiny_llama().eval()
    task = pretrain(model, max_length=16)
    with torch.inference_mode():
        batch = collate(task.encode([*LONG, *ROWS[:2]], tokenizer(), labelled=True))
        long, *_ = task.answer(model, batch, [*LONG, *ROWS[:2]], tokenizer())
        text = LONG[0]["text"]
        ids = [102, *tokenizer().encode(text, add_special_tokens=False).ids, 102]
        total = 0.0
        for start in range(0, len(ids) - 1, 16):
            window = torch.tensor(ids[start : start + 16])
            logits = model(window, torch.arange(len(window)), Packed.of([len(window)]))["lm"].log_softmax(-1)
            following = ids[start + 1 : start + 17]
            total -= sum(float(logits[i, token]) for i, token in enumerate(following))
    assert long.nll.sum() == pytest.approx(total, rel=1e-5)
    assert long.tokens.sum() == len(ids) - 1
    assert long.bits_per_byte == pytest.approx(total / math.log(2) / len(text.encode()), rel=1e-5)


def test_scores_do_not_depend_on_what_else_is_in_the_batch() -> None:
    for make, options in CASES:
        model = make().eval()
        task = pretrain(model, max_length=24, **options)
        with torch.inference_mode():
            together = task.answer(model, collate(task.encode(ROWS, tokenizer(), labelled=True)), ROWS, tokenizer())
            for row, one in zip(ROWS, together, strict=True):
                [alone] = task.answer(
                    model, collate(task.encode([row], tokenizer(), labelled=True)), [row], tokenizer()
                )
                assert alone.nll.sum() == pytest.approx(one.nll.sum(), rel=1e-4)
                assert alone.tokens.tolist() == one.tokens.tolist()


def test_metrics_have_perplexity_and_bits_per_byte_with_intervals_around_them() -> None:
    model = tiny_llama().eval()
    task = pretrain(model, max_length=16)
    data = [*LONG, *ROWS]
    with torch.inference_mode():
        answers = task.answer(model, collate(task.encode(data, tokenizer(), labelled=True)), data, tokenizer())
    found = task.evaluate(answers, data)
    assert found.values["perplexity"] == pytest.approx(math.exp(found.values["loss"]))
    size = sum(len(row["text"].encode()) for row in data)
    nll = sum(answer.nll.sum() for answer in answers)
    assert found.values["bits_per_byte"] == pytest.approx(nll / math.log(2) / size)
    for name in ("loss", "perplexity", "bits_per_byte"):
        low, high = found.intervals[name]
        assert low < found.values[name] < high


def test_the_state_gives_the_same_task_again() -> None:
    for options in ({"objective": "causal"}, {"objective": "masked", "whole_words": True}):
        task = pretrain(max_length=32, **options)
        again = Pretrain.from_state(task.state())
        assert again.state() == task.state()
        assert again.known == task.known


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (tiny_bert, {"objective": "causal"}, "sees the tokens"),
        (tiny_llama, {"objective": "masked"}, "does not see"),
        (tiny_bert, {"objective": "masked", "documents": "separate", "max_length": 4096}, "longer than"),
        (tiny_llama, {"max_length": 4096}, "longer than"),
    ],
)
def test_a_model_of_the_wrong_kind_is_refused(make, options, match) -> None:
    with pytest.raises(UserError, match=match):
        pretrain(make(), **options)


def test_options_that_could_not_act_are_refused() -> None:
    with pytest.raises(UserError, match="nothing is masked"):
        pretrain(whole_words=True)
    with pytest.raises(UserError, match="ends a text"):
        pretrain(end_token="<nothing>")
