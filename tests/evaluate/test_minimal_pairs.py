"""Minimal pairs: judged by the whole likelihood of a sentence, whichever way the pair is batched."""

from __future__ import annotations

import pytest
import torch
from tests.train.parts import generator, rows, tiny_llama, tokenizer

from lexmill.engine import Loaded, TorchEngine
from lexmill.errors import UserError
from lexmill.evaluate.minimal_pairs import minimal_pairs
from lexmill.nn import Packed
from lexmill.tasks.pretrain import Pretrain, PretrainOptions

TEXTS = [row["text"] for row in rows(24)]
PAIRS = [
    {"good": good, "bad": bad, "uid": f"case_{i % 2}"}
    for i, (good, bad) in enumerate(zip(TEXTS[::2], TEXTS[1::2], strict=True))
]


def test_accuracy_is_the_share_of_pairs_whose_good_sentence_is_likelier() -> None:
    model = tiny_llama().eval()
    task = Pretrain.from_records([], {"text": "text"}, PretrainOptions(max_length=128)).for_tokenizer(tokenizer())
    torch.manual_seed(1)
    task.attach(model)
    found = minimal_pairs(TorchEngine(Loaded(task, model, tokenizer())), PAIRS)

    def nll(text: str) -> float:
        ids = [102, *tokenizer().encode(text, add_special_tokens=False).ids, 102]
        with torch.no_grad():
            logits = model(torch.tensor(ids[:-1]), torch.arange(len(ids) - 1), Packed.of([len(ids) - 1]))["lm"]
        return -float(logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).sum())

    right = [nll(pair["good"]) < nll(pair["bad"]) for pair in PAIRS]
    assert 0 < sum(right) < len(right)
    assert found.values["accuracy"] == pytest.approx(sum(right) / len(right))
    low, high = found.intervals["accuracy"]
    assert low < found.values["accuracy"] < high
    table = {row["phenomenon"]: row["accuracy"] for row in found.tables["phenomena"]}
    assert table == {f"case_{i}": pytest.approx(sum(right[i::2]) / len(right[i::2])) for i in range(2)}


def test_what_cannot_be_judged_is_said() -> None:
    model = tiny_llama().eval()
    engine = TorchEngine(Loaded(generator(model, pair=False), model, tokenizer()))
    with pytest.raises(UserError, match="no pairs"):
        minimal_pairs(engine, [])
