"""Generation from instructions, dialogues and preferences: what is learnt, said, streamed and served."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.data.test_chat import CHATML, TALK, stored
from tests.train.parts import tiny_llama, tokenizer

from lexmill.data import collate, find_columns, open_source
from lexmill.data.batch import IGNORE
from lexmill.data.chat import ChatTemplate
from lexmill.data.check import check
from lexmill.engine import Loaded, Request, TorchEngine
from lexmill.errors import UserError
from lexmill.metrics import distinct
from lexmill.models import Generated
from lexmill.tasks import Generate
from lexmill.tasks.dialogue import ROLES
from lexmill.tasks.generate import GenerateOptions, GenerateRequest
from lexmill.tasks.preference import Preference, losses
from lexmill.tasks.speaking import Speaker

SEP = 102
TEMPLATE = ChatTemplate(CHATML.replace("<|im_end|>", "[SEP]").replace("<|im_start|>", "[MASK]"), {})
INSTRUCTIONS = {"instruction": "instruction", "input": "input", "output": "output"}
PAIRS = {"text": "prompt", "chosen": "chosen", "rejected": "rejected"}


def chatting(columns: dict[str, str], **options: Any) -> Generate:
    return Generate(columns, GenerateOptions(chat_template=TEMPLATE.source, **options))


def said(example: Any) -> list[str]:
    """The learnt tokens, by run."""
    words, runs = tokenizer(), [[]]
    for token in np.append(example.token_labels["lm"], IGNORE):
        if token == IGNORE:
            runs.append([])
        else:
            runs[-1].append(int(token))
    return [words.decode(run, skip_special_tokens=False) for run in runs if run]


def test_all_turns_of_the_assistant_are_learnt_and_nothing_else() -> None:
    [example] = chatting({"messages": "talk"}).encode([{"talk": TALK}], tokenizer(), labelled=True)
    assert said(example) == ["here. [SEP]", "there [SEP]"]
    ids, labels = example.streams["source"][0].ids, example.token_labels["lm"]
    learnt = np.flatnonzero(labels != IGNORE)
    assert (ids[learnt + 1] == labels[learnt]).all()


def test_a_prompt_is_put_in_a_request_as_in_training() -> None:
    task = chatting(INSTRUCTIONS)
    row = {"instruction": "say hello", "input": "to bob", "output": "hello bob"}
    words = tokenizer()
    [trained] = task.encode([row], words, labelled=True)
    assert said(trained) == ["hello bob [SEP]"]
    [asked] = task.encode([row], words, labelled=False)
    prompt = asked.streams["source"][0].ids
    assert (trained.streams["source"][0].ids[: len(prompt)] == prompt).all()
    assert trained.token_labels["lm"][len(prompt) - 1] != IGNORE
    turn = [{"role": "user", "content": "say hello\nto bob"}]
    for asking in ("say hello\nto bob", turn):
        [record] = task.items(GenerateRequest.model_validate({"prompts": [asking]}))
        [again] = task.encode([record], words, labelled=False)
        assert (again.streams["source"][0].ids == prompt).all()


def test_a_model_without_a_template_takes_no_dialogue() -> None:
    task = Generate({"text": "text"}, GenerateOptions())
    with pytest.raises(UserError, match="no chat template"):
        task.encode([{"messages": TALK[:1]}], tokenizer(), labelled=False)
    own = Generate({"text": "text"}, GenerateOptions(chat_template=TEMPLATE.source))
    [example] = own.encode([{"messages": TALK[:1]}], tokenizer(), labelled=False)
    assert tokenizer().decode(example.streams["source"][0].ids, skip_special_tokens=False).endswith("assistant")


@pytest.mark.parametrize(
    ("name", "roles"),
    [("sft_en", INSTRUCTIONS), ("sft_zh", INSTRUCTIONS), ("dpo_en", PAIRS), ("dpo_zh", PAIRS)],
)
def test_the_columns_of_real_data_are_found(name: str, roles: dict[str, str], shared_data: Path) -> None:
    source = open_source(shared_data / "llama_factory_sft" / f"{name}.jsonl.xz")
    columns = find_columns(source, {}, ROLES)
    assert dict(columns) == roles
    report = check(source, None, columns)
    assert "empty_text" not in {finding.code for finding in report.findings}


def test_the_template_travels_with_the_task(tmp_path: Path) -> None:
    options = Generate.defaults(stored(tmp_path, "{{ bos_token }}" + TEMPLATE.source))
    task = Generate(INSTRUCTIONS, GenerateOptions(**options))
    again = Generate.from_state(json.loads(json.dumps(task.state())))
    assert again.state() == task.state()
    [example] = again.encode([{"instruction": "x"}], tokenizer(), labelled=False)
    assert tokenizer().decode(example.streams["source"][0].ids, skip_special_tokens=False).startswith("< s > [MASK]")


# --- answers ---------------------------------------------------------------------------------------------------


def engine(task: Generate, **changes: Any) -> TorchEngine:
    model = tiny_llama(**changes)
    torch.manual_seed(1)
    task.attach(model)
    return TorchEngine(Loaded(task, model, tokenizer()))


def test_pieces_make_up_the_answer() -> None:
    task = Generate({"text": "text"}, GenerateOptions())
    runs = engine(task)
    [record] = task.items(GenerateRequest(prompts=["where is it"], max_new_tokens=12, temperature=1.0, seed=5))
    pieces: list[str] = []
    [told] = runs.run([Request(record, hear=lambda piece: pieces.append(piece) or True)])
    [plain] = runs.run([Request(record)])
    assert told == plain
    assert "".join(pieces) == plain.text
    assert len(pieces) > 3


def test_an_answer_that_nobody_hears_any_more_ends() -> None:
    task = Generate({"text": "text"}, GenerateOptions())
    [answer] = engine(task).run([Request({"text": "where is it", "max_new_tokens": 20}, hear=lambda piece: False)])
    assert len(answer.ids) < 4


def test_a_stop_string_ends_an_answer_and_is_not_part_of_it() -> None:
    task = Generate({"text": "text"}, GenerateOptions())
    runs = engine(task)
    record = {"text": "where is it", "max_new_tokens": 12, "temperature": 1.0, "seed": 5}
    [free] = runs.run([Request(record)])
    stop = free.text[len(free.text) // 2 :][:4]
    pieces: list[str] = []
    [cut] = runs.run([Request({**record, "stop": [stop]}, hear=lambda piece: pieces.append(piece) or True)])
    assert cut.text == free.text[: free.text.index(stop)] == "".join(pieces)
    assert cut.finish_reason == "stop"
    assert len(cut.ids) < len(free.ids)


def test_no_piece_holds_half_a_character_or_the_start_of_a_stop_string() -> None:
    from tests.artifact.test_gguf import byte_level

    words = byte_level()
    text = "a 中文 STOPPED é STOP more"
    ids = words.encode(text).ids
    pieces: list[str] = []
    voice = Speaker(words, 1, ["STOP m", "STOP-"], lambda piece: pieces.append(piece) or True)
    so_far = Generated()
    for token in ids:
        so_far.ids.append(token)
        if voice(so_far):
            break
    assert "".join(pieces) == voice.finish(so_far) == "a 中文 STOPPED é "
    assert all("\ufffd" not in piece for piece in pieces)
    assert len(so_far.ids) < len(ids)


def test_requests_are_sampled_by_their_own_seeds() -> None:
    task = Generate({"text": "text"}, GenerateOptions())
    request = GenerateRequest(prompts=["x", "x"], temperature=0.7, top_k=3, seed=9, stop=["."])
    own = {"temperature": 0.7, "top_k": 3, "stop": ["."], "max_new_tokens": 64, "text": "x"}
    assert task.items(request) == [{**own, "seed": 9}, {**own, "seed": 10}]


def test_an_evaluation_says_how_varied_answers_are() -> None:
    task = Generate({"text": "text", "text_pair": "reply"}, GenerateOptions(write_answers=True, max_new_tokens=5))
    rows = [{"text": "where is it", "reply": "here"}, {"text": "and this", "reply": "it is there"}]
    runs = engine(task)
    answers = [answer for _, answer in runs.run_stream(rows, labelled=True)]
    free = [runs.run([Request({"text": row["text"]})])[0].ids for row in rows]
    assert [answer.answer for answer in answers] == free
    found = task.evaluate(answers, rows).values
    assert found["distinct_1"] == distinct(free, 1) == len({*free[0], *free[1]}) / sum(map(len, free))
    assert found["perplexity"] > 1


def test_distinct_counts_n_grams() -> None:
    assert distinct([[1, 2, 1, 2], [1, 2]], 2) == 2 / 4
    assert distinct([[1]], 2) == 0.0


# --- preferences -----------------------------------------------------------------------------------------------


def pairs(shared_data: Path, count: int) -> list[dict[str, Any]]:
    with lzma.open(shared_data / "llama_factory_sft" / "dpo_en.jsonl.xz", "rt", encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    return sorted(found, key=lambda row: len(row["prompt"] + row["chosen"] + row["rejected"]))[:count]


def test_the_loss_is_the_formula() -> None:
    values = torch.tensor([[-3.0, -5.0], [-4.0, -2.0]], dtype=torch.float64)
    before = torch.tensor([[-3.5, -4.0], [-4.0, -3.0]], dtype=torch.float64)
    for smoothing in (0.0, 0.2):
        for found, (c, r), (c0, r0) in zip(losses(values, before, 0.3, smoothing), values, before, strict=True):
            good = 1 / (1 + np.exp(-0.3 * float((c - c0) - (r - r0))))
            assert float(found) == pytest.approx(-(1 - smoothing) * np.log(good) - smoothing * np.log(1 - good))


def test_a_pair_without_its_reference_has_no_reward() -> None:
    task = Generate(PAIRS, GenerateOptions())
    found = task.evaluate([Preference(-1.0, -2.0), Preference(-3.0, -2.5)], [{}, {}])
    assert found.values == {"accuracy": 0.5}


def test_each_reply_has_the_log_probability_it_has_alone(shared_data: Path) -> None:
    rows = pairs(shared_data, 3)
    task = Generate(PAIRS, GenerateOptions(max_length=100))
    model = tiny_llama().eval()
    task.attach(model)
    together = task.forward(model, collate(task.encode(rows, tokenizer(), labelled=True)))["preference"]
    alone = Generate({"text": "prompt", "text_pair": "reply"}, GenerateOptions(max_length=100))
    runs = TorchEngine(Loaded(alone, model, tokenizer()))
    replies = [{"prompt": row["prompt"], "reply": row[which]} for row in rows for which in ("chosen", "rejected")]
    expected = [-answer.nll for _, answer in runs.run_stream(replies, labelled=True)]
    assert together.tolist() == pytest.approx(expected, rel=1e-5)


def test_training_widens_the_margin_over_the_starting_model(shared_data: Path) -> None:
    from lexmill.train import accumulate

    rows = pairs(shared_data, 8)
    model = tiny_llama()
    torch.manual_seed(1)
    plain = Generate(PAIRS, GenerateOptions(max_length=100, beta=0.5))
    plain.attach(model)
    task = plain.before(model, iter(rows), tokenizer())
    examples = task.encode(rows, tokenizer(), labelled=True)
    assert all("reference" in example.labels for example in examples)
    assert task.state()["reference"]
    assert task.state() != plain.state()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(8):
        first, _ = accumulate(model, task, [collate(examples[:5]), collate(examples[5:])], seed=step)
        if step == 0:
            # The model is its own reference: every margin is 0.
            assert first["preference"] == pytest.approx(np.log(2), rel=1e-4)
        for parameter in model.parameters():
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()
        optimizer.step()
        optimizer.zero_grad()
    answers = [one for _, one in TorchEngine(Loaded(task, model, tokenizer())).run_stream(rows, labelled=True)]
    found = task.evaluate(answers, rows)
    assert found.values["reward_margin"] > 0.5
    assert found.values["reward_accuracy"] == 1.0
    assert found.values["loss"] < 0.6
    low, high = found.intervals["reward_margin"]
    assert 0 < low < found.values["reward_margin"] < high
