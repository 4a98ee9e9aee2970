"""Answers in contexts: windows, offsets in raw text, the loss over each window, the decoding, real rows."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.fit.conftest import Recipe
from tests.serve.conftest import Start
from tests.train.parts import distance, gradients, tiny_bert, tokenizer, write_rows

from lexmill import load
from lexmill.data import open_source
from lexmill.data.batch import collate
from lexmill.engine import TorchEngine
from lexmill.errors import UserError
from lexmill.fit import fit
from lexmill.metrics import answer_scores
from lexmill.metrics.answers import english_tokens, mixed_tokens
from lexmill.tasks import Answer
from lexmill.tasks.answer import AnswerOptions, Found, best_span, log_normalisers
from lexmill.tasks.inputs import dense
from lexmill.tasks.windows import windows_of
from lexmill.train import accumulate
from lexmill.train.step import Manner

COLUMNS = {"question": "question", "context": "context", "answers": "answers"}
CONTEXT = "The fee is three dollars for a card and nine for two of them, unless it was lost abroad last year."
SETS = [("cmrc2018", "dev"), ("policyqa", "dev"), ("squadshifts", "new_wiki")]


def task_of(**options: Any) -> Answer:
    return Answer.from_records([], COLUMNS, AnswerOptions(**{"max_length": 24, "stride": 8, **options}))


def row(text: str | None, context: str = CONTEXT) -> dict[str, Any]:
    answers = [] if text is None else [{"text": text, "start": context.index(text)}]
    return {"question": "What is it?", "context": context, "answers": answers}


DATA = [
    row("three dollars"),
    {**row("lost abroad"), "question": "Unless?"},
    row(None, CONTEXT[30:]),
    {**row("nine"), "question": "For two?"},
    row("year", "It was last year."),
]


def perfect(task: Answer, record: dict[str, Any]) -> Found:
    """What is decoded where the logits say exactly what the labels say."""
    (example,) = task.encode([record], tokenizer(), labelled=True)
    (windows,) = windows_of(
        [(record["question"], record["context"])], tokenizer(), task.options.max_length, task.options.stride
    )
    marks = np.stack([example.token_labels[end] == 1 for end in ("start", "end")], -1)
    logits = np.split(np.where(marks, 9.0, -9.0), np.cumsum([len(one.tokens.ids) for one in windows])[:-1])
    return task.best(windows, logits, record["context"])


@pytest.mark.parametrize(
    ("context", "text"),
    [
        ("Le café de Zoë est là-bas.", "Zoë"),
        ("价格是（ＡＢＣ）１２３元,不含税。", "ＡＢＣ"),
        ("He said 👍🏽 and  then  left 🎉 early.", "left"),
        ("光荣和ω-force开发了Game Boy版本。", "Game Boy"),
        ("e\u0301tude in C, by Ana\u00efs", "Anaïs"),
    ],
)
def test_offsets_are_those_of_the_raw_text(context: str, text: str) -> None:
    found = perfect(task_of(), row(text, context))
    assert found.text == text
    assert (found.start, found.end) == (context.index(text), context.index(text) + len(text))


@pytest.mark.parametrize(("name", "part"), SETS)
def test_real_answers_are_found_again_from_their_labels(shared_data: Path, name: str, part: str) -> None:
    task = task_of(max_length=160, stride=90, max_answer_length=90)
    whole = 0
    for one in open_source(shared_data / name / f"{part}.jsonl.xz").peek(40):
        found, gold = perfect(task, one.values), one.values["answers"][0]
        start, end = gold["start"], gold["start"] + len(gold["text"])
        # A token may be wider than the answer, never narrower.
        assert found.start <= start + len(gold["text"]) - len(gold["text"].lstrip())
        assert found.end >= start + len(gold["text"].rstrip())
        whole += (found.start, found.end) == (start, end)
    assert whole >= 34


def test_windows_hold_every_token_of_the_context_and_overlap() -> None:
    [windows] = windows_of([("What?", CONTEXT * 3)], tokenizer(), 24, 8)
    whole = tokenizer().encode(CONTEXT * 3, add_special_tokens=False)
    seen: dict[int, int] = {}
    for before, one in zip([None, *windows], windows, strict=False):
        ids = dict(enumerate(one.tokens.ids[one.rows].tolist(), one.first))
        assert all(seen.get(place, token) == token for place, token in ids.items())
        assert before is None or before.first + len(before.rows) - one.first == 8
        seen |= ids
        assert one.tokens.types is not None
        assert set(one.tokens.types[one.rows].tolist()) == {1}
    assert len(windows) > 4
    assert [seen[place] for place in range(len(seen))] == whole.ids


def test_what_cannot_be_used_says_why() -> None:
    task = task_of()
    for record, message in [
        ({**row(None), "question": "why " * 30}, "leaves 0 for its context"),
        ({**row(None), "answers": [{"text": "fee", "start": 0}]}, "does not stand at character 0"),
        ({**row(None), "answers": "fee"}, "no list of answers"),
    ]:
        with pytest.raises(UserError, match=message):
            task.encode([record], tokenizer(), labelled=True)
    squad = {**row(None), "answers": {"text": ["fee"], "answer_start": [4]}}
    assert perfect(task, squad).text == "fee"
    assert Answer.from_state(json.loads(json.dumps(task.state()))).state() == task.state()


def test_an_answer_that_no_window_holds_is_told_of_and_not_learnt() -> None:
    task, long = task_of().for_tokenizer(tokenizer()), row(CONTEXT)
    [example] = task.encode([long], tokenizer(), labelled=True)
    batch = collate([example])
    assert {end: weights.sum() for end, weights in task.item_weights(batch).items()} == {"start": 0, "end": 0}
    rows = [(f"file:{i}", record) for i, record in enumerate([*DATA, long])]
    [finding] = task.inspect(iter(rows))
    assert (finding.code, finding.count) == ("unreachable_answers", 1)
    assert f"file:{len(DATA)}" in finding.examples[0]
    assert list(task.inspect(iter(rows[:-1]))) == []


def test_the_loss_is_that_of_the_slow_loop_packed_padded_and_cut() -> None:
    model, task = tiny_bert().double(), task_of()
    task.attach(model)
    items = task.encode([*DATA, {**DATA[0], "answers": None}], tokenizer(), labelled=True)

    def run(parts: list[Any], **how: Any) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        found, _ = accumulate(model, task, [collate(part) for part in parts], seed=0, manner=Manner(**how))
        return found, gradients(model)

    whole, padded, cut = run([items]), run([items], arrange=dense), run([items[:1], items[1:3], items[3:]])
    batch = collate(items[:5])
    outputs, offsets = task.forward(model, batch), batch.streams["source"].offsets
    for end in ("start", "end"):
        slow = [
            torch.nn.functional.cross_entropy(outputs[end][a:b], torch.tensor(int(batch.masks[end][a:b].argmax())))
            for a, b in pairwise(offsets)
        ]
        assert whole[0][end] == pytest.approx(float(torch.stack(slow).mean().detach()), rel=1e-10)
        for other in (padded, cut):
            assert other[0][end] == pytest.approx(whole[0][end], rel=1e-10)
            assert distance(other[1], whole[1]) <= 1e-10


def test_sums_by_sequence_do_not_overflow() -> None:
    logits = torch.tensor([1000.0, 999.0, -1000.0], dtype=torch.float64)
    found = log_normalisers(logits, torch.tensor([0, 0, 1]), 2)
    assert found.tolist() == pytest.approx([float(logits[:2].logsumexp(0)), -1000.0])


def test_the_best_span_is_that_of_the_slow_loop() -> None:
    generator = np.random.default_rng(0)
    for longest in (1, 3, 50):
        logs = generator.normal(size=(12, 2))
        spans = [(i, j) for i in range(12) for j in range(i, min(12, i + longest))]
        first, last = max(spans, key=lambda span: logs[span[0], 0] + logs[span[1], 1])
        assert best_span(logs, longest) == (logs[first, 0] + logs[last, 1], first, last)


def test_no_answer_is_given_where_every_window_says_so() -> None:
    asked = task_of(no_answer_threshold=0.0)
    assert perfect(asked, row(None)).text == ""
    assert perfect(task_of(), row(None)).text != ""
    assert perfect(asked, row("lost abroad")).text == "lost abroad"
    assert perfect(asked, {**row(None), "context": ""}).text == ""
    found = asked.evaluate([perfect(asked, one) for one in DATA], DATA)
    assert found.values == {"exact_match": 1.0, "f1": 1.0, "no_answer_accuracy": 1.0}


def test_scores_follow_the_rules_of_both_languages() -> None:
    assert english_tokens("The U.S. fee, an 'old' one") == ["us", "fee", "old", "one"]
    assert mixed_tokens("《光荣》和 Game-Boy，3.0") == ["光", "荣", "和", "gameboy30"]
    assert answer_scores("a red car", ["the car", "blue"], chinese=False) == (0.0, pytest.approx(2 / 3))
    assert answer_scores("The car.", ["car"], chinese=False) == (1.0, 1.0)
    assert answer_scores("光荣公司", ["荣公"], chinese=True) == (0.0, pytest.approx(2 / 3))
    assert answer_scores("光公", ["光荣公"], chinese=True) == (0.0, pytest.approx(2 / 5))  # one run, not a sum
    assert answer_scores("", [], chinese=True) == (1.0, 1.0)
    assert answer_scores("car", [], chinese=False) == (0.0, 0.0)


def test_a_small_model_learns_its_answers_by_heart() -> None:
    model, task = tiny_bert(), task_of(no_answer_threshold=0.0)
    torch.manual_seed(0)
    task.attach(model)
    batch = collate(task.encode(DATA, tokenizer(), labelled=True))
    model.trunk.embeddings.token.sparse = False
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        accumulate(model, task, [batch], seed=0, manner=Manner())
        optimiser.step()
        optimiser.zero_grad()
    model.eval()
    with torch.inference_mode():
        answers = task.answer(model, batch, DATA, tokenizer())
    assert [one.text for one in answers] == ["three dollars", "lost abroad", "", "nine", "year"]


def test_real_questions_are_fitted_and_answered_and_served(
    recipe: Recipe, start: Start, shared_data: Path, tmp_path: Path
) -> None:
    data = [one.values for one in open_source(shared_data / "policyqa" / "dev.jsonl.xz").peek(24)]
    train = write_rows(tmp_path / "train.jsonl", data)
    options = {"max_length": 100, "stride": 60}
    made = fit(recipe(data_={"train": train, "test": train}, task="answer", options=options), tmp_path / "out")
    artifact = made.artifact
    assert set(artifact.manifest.metrics["test"]) == {"exact_match", "f1"}
    item = {"question": data[0]["question"], "context": data[0]["context"]}
    opened = load(artifact.path)
    (found,) = opened.predict([item], raw=True)
    assert found["answer"] == item["context"][found["start"] : found["end"]]
    assert 0 <= found["score"] <= 1
    assert len(found["logits"]) % 2 == 0
    reply = start({"policies": TorchEngine(artifact)}).post("/v1/answer", json={"items": [item]}).json()
    assert reply["answers"][0]["answer"] == found["answer"]
