"""`fit` keeps activations where that can act, says what it saved, and says so where it cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.fit.conftest import Recipe

from lexmill.adapt import AdaptConfig
from lexmill.errors import UserError
from lexmill.fit import FitConfig, FitResult, Watch, fit

UPPER: dict[str, Any] = {"method": "lora", "layers": 1}


def run(config: FitConfig, out: Path) -> tuple[FitResult, list[str]]:
    notes: list[str] = []
    return fit(config, out, watch=Watch(notes.append)), notes


def test_the_lower_layers_run_once_where_they_are_not_trained(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe(adapt=AdaptConfig(**UPPER), train_={"epochs": 3})
    found, notes = run(config, tmp_path / "out")
    effect = found.training
    assert any("running the lowest layer once, without dropout" in note for note in notes)
    assert effect["kept_layers"] == 1
    assert effect["kept_bytes"] > 48 * 32 * 4
    assert effect["kept_seconds"] > 0
    # Every step computes one layer of two; the other was computed once for three epochs.
    assert effect["forward_known"] == pytest.approx(1 / 2)
    assert effect["positions_per_token"] == pytest.approx(1 / 2 + 1 / 6, abs=0.02)
    assert not any("kept" in path.name for path in (tmp_path / "out").rglob("*"))


@pytest.mark.parametrize(
    ("adapt", "train", "why"),
    [
        ({"method": "lora"}, {"epochs": 2}, "down to the lowest layer"),
        (UPPER, {"epochs": 1}, "only once"),
        (UPPER | {"keep_gigabytes": 1e-5}, {"epochs": 2}, "more than adapt.keep_gigabytes"),
        (UPPER, {"epochs": 2, "adversarial": "fgm"}, "moves the word vectors"),
    ],
)
def test_where_nothing_can_be_kept_a_run_goes_without_and_insisting_is_an_error(
    recipe: Recipe, tmp_path: Path, adapt: dict[str, Any], train: dict[str, Any], why: str
) -> None:
    found, notes = run(recipe(adapt=AdaptConfig(**adapt), train_=train), tmp_path / "out")
    assert "kept_bytes" not in found.training
    assert found.training["positions_per_token"] >= 1
    # A run that trains every layer never had a choice to tell of.
    assert any(why in note for note in notes) == ("layers" in adapt)
    with pytest.raises(UserError, match=why) as error:
        run(recipe(adapt=AdaptConfig(**adapt, keep_activations=True), train_=train), tmp_path / "other")
    assert error.value.where == "adapt.keep_activations"
    assert not list(tmp_path.glob("other*"))


def test_keeping_can_be_turned_off(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe(adapt=AdaptConfig(**UPPER, keep_activations=False), train_={"epochs": 2})
    found, notes = run(config, tmp_path / "out")
    assert found.training["positions_per_token"] >= 1
    assert not any("keeping" in note for note in notes)


def test_a_task_that_changes_its_texts_goes_without_and_insisting_is_an_error(recipe: Recipe, tmp_path: Path) -> None:
    config = recipe(adapt=AdaptConfig(**UPPER), train_={"epochs": 2})
    masked = replace(config, task="pretrain", options={"objective": "masked", "max_length": 16})
    found, notes = run(masked, tmp_path / "out")
    assert "kept_bytes" not in found.training
    assert any("changes its texts from epoch to epoch" in note for note in notes)
    with pytest.raises(UserError, match="changes its texts from epoch to epoch"):
        run(replace(masked, adapt=AdaptConfig(**UPPER, keep_activations=True)), tmp_path / "other")
