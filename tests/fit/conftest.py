"""A tiny model on disk, and a token cache of the session's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
from tests.train.parts import rows, stored, tiny_bert, write_rows

from lexmill.fit import DataConfig, FitConfig
from lexmill.train import TrainConfig

Recipe = Callable[..., FitConfig]


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEXMILL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _unchecked_shapes() -> Iterator[None]:
    """Whole runs are long, and every shape in them is checked by the tests of the rooms below."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored(tiny_bert(dropout=0.1, attention_dropout=0.1), tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="session")
def recipe(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The config of a small run on 48 real questions; keywords change `FitConfig`, `train` and `data` in part."""
    train = write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", rows(48))

    def make(*, train_: dict[str, Any] | None = None, data_: dict[str, Any] | None = None, **changes: Any) -> FitConfig:
        basis = FitConfig(
            DataConfig(train), model=str(tiny_model), train=TrainConfig(epochs=1, batch_size=8, learning_rate=1e-3)
        )
        return replace(
            basis, train=replace(basis.train, **train_ or {}), data=replace(basis.data, **data_ or {}), **changes
        )

    return make
