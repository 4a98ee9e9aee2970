"""Three small classifiers of the same questions, and a folder for token caches."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.train.parts import rows, stored, tiny_bert, write_rows

import lexmill as lm


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`a`, `b` (the same labels) and `c` (others), with the rows they were trained on."""
    place = tmp_path_factory.mktemp("trained")
    stored(tiny_bert(), place / "bert")
    write_rows(place / "rows.jsonl", rows(64))
    write_rows(place / "other.jsonl", [{**row, "label": row["label"] + "!"} for row in rows(64)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEXMILL_CACHE", str(place / "cache"))
        for name, file, seed in (("a", "rows", 0), ("b", "rows", 1), ("c", "other", 0)):
            common = {"train.batch_size": 8, "train.learning_rate": 3e-3}
            lm.fit(place / f"{file}.jsonl", out=place / name, model=place / "bert", epochs=6, seed=seed, set=common)
    return place
