"""Causal language modelling: what is learnt, what the loss is, and how answers end."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.train.parts import batch_of, generator, rows, tiny_llama, tokenizer

from lexmill import models
from lexmill.data.batch import IGNORE
from lexmill.engine import Loaded, Request, TorchEngine
from lexmill.errors import UserError
from lexmill.nn import Packed
from lexmill.tasks import Generate
from lexmill.tasks.generate import GenerateAnswer, GenerateOptions, GenerateRequest
from lexmill.train import accumulate

SEP = 102


def test_only_the_reply_and_the_end_token_are_learnt() -> None:
    task = generator(tiny_llama())
    words = tokenizer()
    [example] = task.encode([{"text": "where is it", "label": "on its way"}], words, labelled=True)
    ids = example.streams["source"][0].ids.tolist()
    reply = words.encode("on its way", add_special_tokens=False).ids
    assert ids == [*words.encode("where is it").ids, *reply, SEP]
    labels = example.token_labels["lm"].tolist()
    prompt = len(ids) - len(reply) - 1
    assert labels == [IGNORE] * (prompt - 1) + [*reply, SEP] + [IGNORE]


def test_a_plain_text_is_learnt_whole() -> None:
    task = generator(tiny_llama(), pair=False)
    [example] = task.encode([{"text": "where is it"}], tokenizer(), labelled=True)
    ids = example.streams["source"][0].ids.tolist()
    assert example.token_labels["lm"].tolist() == [*ids[1:], IGNORE]


def test_a_long_text_is_cut() -> None:
    task = generator(tiny_llama(), max_length=7)
    [example] = task.encode([{"text": "where " * 20, "label": "x"}], tokenizer(), labelled=True)
    assert len(example.streams["source"][0].ids) == 7
    assert set(example.token_labels["lm"].tolist()) == {IGNORE}


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_is_that_of_transformers_on_the_same_tokens(tmp_path: Path, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    model = tiny_llama(tied_output=tied)
    task = generator(model)
    items = task.encode(rows(6), tokenizer(), labelled=True)
    ours = accumulate(model, task, [batch_of(task, items)], seed=0)[0]["lm"]
    models.save(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    total = count = 0.0
    with torch.no_grad():
        for item in items:
            ids = torch.from_numpy(item.streams["source"][0].ids)[None]
            # Their labels are not shifted yet: the label of a token is the token itself.
            labels = np.append(IGNORE, item.token_labels["lm"][:-1])
            targets = int((labels != IGNORE).sum())
            total += float(theirs(input_ids=ids, labels=torch.from_numpy(labels)[None]).loss) * targets
            count += targets
    assert ours == pytest.approx(total / count, rel=1e-5)


def test_a_greedy_answer_equals_the_argmax_of_the_whole_text_each_time() -> None:
    model = tiny_llama()
    task = generator(model)
    words = tokenizer()
    model.eval()
    prompts = [row["text"] for row in rows(3)]
    request = GenerateRequest(prompts=prompts, max_new_tokens=5, raw=True)
    answers = TorchEngine(Loaded(task, model, words)).run([Request(record) for record in task.items(request)])
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = words.encode(prompt).ids
        for token, logprob in zip(answer.ids, answer.logprobs, strict=True):
            best, score = _next(model, ids)
            assert token == best
            assert logprob == pytest.approx(score, rel=1e-4)
            ids = [*ids, token]
        shown = task.render(answer, request)
        assert shown["tokens"] == len(answer.ids) <= 5
        assert len(shown["logprobs"]) == len(answer.ids)
        GenerateAnswer.model_validate(shown)


def _next(model: models.Model, ids: list[int]) -> tuple[int, float]:
    with torch.inference_mode():
        hidden = model.hidden(torch.tensor(ids), torch.arange(len(ids)), Packed.of([len(ids)]))
        best = model.heads["lm"](hidden[-1:]).log_softmax(-1).max(-1)
    return int(best.indices), float(best.values)


def test_an_answer_ends_with_the_end_token_which_is_not_shown() -> None:
    model = tiny_llama()
    task = generator(model)
    with torch.no_grad():
        # Every logit is 0, and the first of the largest is token 0, [PAD].
        model.heads["lm"].output.weight.zero_()
    engine = TorchEngine(Loaded(task, model, tokenizer()))
    [never_ends] = engine.run([Request({"text": "where is it", "max_new_tokens": 4})])
    assert (never_ends.finish_reason, len(never_ends.ids)) == ("length", 4)
    assert set(never_ends.ids) == {0}
    ends = generator(tiny_llama(), end_token="[PAD]")
    [answer] = TorchEngine(Loaded(ends, model, tokenizer())).run([Request({"text": "where is it"})])
    assert (answer.finish_reason, answer.ids, answer.text) == ("end", (0,), "")


def test_an_unknown_end_token_is_refused() -> None:
    task = Generate({"text": "text"}, GenerateOptions(end_token="<stop>"))
    with pytest.raises(UserError, match="<stop>"):
        task.encode([{"text": "x"}], tokenizer(), labelled=True)


def test_scores_are_per_token_and_perplexity_follows() -> None:
    model = tiny_llama()
    task = generator(model)
    data = rows(8)
    engine = TorchEngine(Loaded(task, model, tokenizer()))
    answers = [answer for _, answer in engine.run_stream(data, labelled=True)]
    found = task.evaluate(answers, data)
    batch = batch_of(task, task.encode(data, tokenizer(), labelled=True))
    assert found.values["loss"] == pytest.approx(accumulate(model, task, [batch], seed=0)[0]["lm"], rel=1e-5)
    assert found.values["perplexity"] == pytest.approx(math.exp(found.values["loss"]))
    low, high = found.intervals["loss"]
    assert low <= found.values["loss"] <= high


def test_texts_without_a_token_to_score_are_an_error() -> None:
    model = tiny_llama()
    task = generator(model, max_length=4)
    data = rows(2)
    answers = [a for _, a in TorchEngine(Loaded(task, model, tokenizer())).run_stream(data, labelled=True)]
    with pytest.raises(UserError, match="no token to score"):
        task.evaluate(answers, data)


def test_the_state_survives() -> None:
    task = generator(tiny_llama(), max_new_tokens=3, end_token="[SEP]")
    assert Generate.from_state(task.state()).state() == task.state()
    [record] = Generate.from_state(task.state()).items(GenerateRequest(prompts=["x"]))
    assert record["max_new_tokens"] == 3
