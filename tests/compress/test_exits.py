"""Texts that leave a batch early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.compress.material import assert_reloads, material_of, texts
from tests.small_classifier import small_classifier

from lexmill.compress import Step
from lexmill.compress.exits import ExitsOptions, choose_threshold
from lexmill.data.batch import collate
from lexmill.engine import Loaded, TorchEngine
from lexmill.errors import UserError
from lexmill.evaluate import answered
from lexmill.models.exits import Exits


def with_exits(**options: Any) -> tuple[Loaded, dict[str, float]]:
    method, read = Step("exits", {"epochs": 4, "learning_rate": 1e-2, "max_drop": 0.2, **options}).read("steps[0]")
    return method.apply(small_classifier(), material_of(small_classifier(), train=128), read)


@pytest.mark.parametrize("options", [{}, {"by": "entropy", "train": "joint", "learning_rate": 1e-3}])
def test_texts_leave_and_are_not_computed_further(options: dict[str, Any], tmp_path: Path) -> None:
    loaded, effect = with_exits(**options)
    assert 0 < effect["left_after_1"] <= 1
    assert effect["layers_mean"] == pytest.approx(2 - effect["left_after_1"], abs=1e-5)
    assert effect["validation_after"] >= effect["validation_before"] - 0.2 or options
    engine = TorchEngine(loaded)
    answered(engine, [{"question": text} for text in texts(64, seed=1)])
    assert 0 < effect["positions_saved"] < 1
    assert engine.work.positions < engine.work.tokens
    assert_reloads(loaded, tmp_path)


def test_a_text_is_answered_alone_as_among_others() -> None:
    loaded, _ = with_exits()
    examples = loaded.task.encode([{"question": text} for text in texts(24)], loaded.tokenizer, labelled=False)
    with torch.inference_mode():
        together = loaded.task.forward(loaded.model, collate(examples))["label"]
        alone = [loaded.task.forward(loaded.model, collate([one]))["label"] for one in examples]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_who_leaves_nowhere_is_answered_as_without_exits() -> None:
    loaded, _ = with_exits()
    asked = [{"question": text} for text in texts(8)]
    exits = loaded.model.trunk.exits
    assert isinstance(exits, Exits)
    exits.threshold = 2.0
    found = [[one["label"] for one in answered(TorchEngine(each), asked)[1]] for each in (loaded, small_classifier())]
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-6)


def test_the_threshold_is_where_the_fewest_layers_keep_the_accuracy() -> None:
    gold = torch.tensor([0, 0, 1, 1])
    sure_and_right, unsure_and_wrong = torch.tensor([4.0, 0.0]), torch.tensor([0.5, 0.0])
    first = torch.stack([sure_and_right, sure_and_right, sure_and_right.flip(0), unsure_and_wrong])
    last = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    threshold, shares, layers = choose_threshold(torch.stack([first, last]), gold, [2], 6, ExitsOptions(max_drop=0.0))
    assert 0.62 < threshold <= 0.983
    assert shares == [0.75]
    assert layers == pytest.approx(3.0)
    with pytest.raises(UserError, match="no text can leave"):
        choose_threshold(torch.stack([-first * 0 - last, last]), gold, [2], 6, ExitsOptions(max_drop=0.0))


@pytest.mark.parametrize("layers", [[2], [1, 1], [3]])
def test_exits_that_do_not_stand_on_inner_layers_are_an_error(layers: list[int]) -> None:
    with pytest.raises(UserError, match="no exits"):
        with_exits(layers=layers)
