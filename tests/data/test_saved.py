"""Directories that Hugging Face `datasets` saved, written by `datasets` itself."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from tests.train.parts import rows, stored, tiny_bert

import lexmill as lm
from lexmill.data import cache_key, content_sha256, open_source
from lexmill.errors import UserError

datasets: Any = import_module("datasets")

NAMES = ["calm", "cross"]


def saved(place: Path, count: int = 40, shards: int = 1, names: list[str] = NAMES) -> list[dict[str, Any]]:
    """Save rows with a label by number; the same rows with it by name."""
    given: list[dict[str, Any]] = [{"text": f"row {i}", "label": i % 3 - 1, "tags": [i % 2]} for i in range(count)]
    label = datasets.ClassLabel(names=names)
    features = datasets.Features(text=datasets.Value("string"), label=label, tags=datasets.List(label))
    datasets.Dataset.from_list(given, features=features).save_to_disk(place, num_shards=shards)
    named = [None, *names]
    return [{**row, "label": named[row["label"] + 1], "tags": [names[i] for i in row["tags"]]} for row in given]


@pytest.mark.parametrize("shards", [1, 3])
def test_rows_come_in_order_with_labels_by_name(tmp_path: Path, shards: int) -> None:
    expected = saved(tmp_path / "set", shards=shards)
    assert len(list((tmp_path / "set").glob("*.arrow"))) == shards
    source = open_source(tmp_path / "set")
    assert [row.values for row in source] == expected
    assert [row.line for row in source] == list(range(1, 41))
    assert source.columns() == ["text", "label", "tags"]


def test_a_split_is_named(tmp_path: Path) -> None:
    part = datasets.Dataset.from_dict({"text": ["a", "b"]})
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "set")
    assert [row.values["text"] for row in open_source(tmp_path / "set" / "train")] == ["a", "b"]
    with pytest.raises(UserError, match="is not 'csv'"):
        open_source(tmp_path / "set" / "train", format="csv")
    with pytest.raises(UserError, match="holds 2 splits") as found:
        open_source(tmp_path / "set")
    assert str(tmp_path / "set" / "test") in (found.value.hint or "")
    with pytest.raises(UserError, match="train, test"):
        open_source(tmp_path / "set" / "dev")


def test_a_missing_or_cut_shard_is_named(tmp_path: Path) -> None:
    saved(tmp_path / "set", count=3000, shards=2)
    last = sorted((tmp_path / "set").glob("*.arrow"))[-1]
    whole = last.read_bytes()
    for kept in (0, 5, len(whole) // 2, len(whole) - 8):
        last.write_bytes(whole[:kept])
        with pytest.raises(UserError, match=f"{last.name}: this shard is cut off"):
            list(open_source(tmp_path / "set"))
    last.write_bytes(bytes(100) + whole[100:])
    with pytest.raises(UserError, match="not an Arrow stream"):
        list(open_source(tmp_path / "set"))
    last.unlink()
    with pytest.raises(UserError, match=f"{last.name}: this shard is missing"):
        list(open_source(tmp_path / "set"))


def test_an_unknown_feature_is_refused_by_its_column(tmp_path: Path) -> None:
    features = datasets.Features(grid=datasets.Array2D((1, 2), "int32"))
    datasets.Dataset.from_dict({"grid": [[[1, 2]]]}, features=features).save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match="column 'grid': a feature of type 'Array2D'"):
        list(open_source(tmp_path / "set"))


def test_key_and_hash_cover_every_shard_and_the_names(tmp_path: Path) -> None:
    def keys(place: Path) -> tuple[str, str]:
        source = open_source(place)
        return content_sha256(source), cache_key([source], "t", {})

    saved(tmp_path / "a", shards=2)
    saved(tmp_path / "names", shards=2, names=["calm", "angry"])
    before = keys(tmp_path / "a")
    assert keys(tmp_path / "a") == before
    assert not set(keys(tmp_path / "names")) & set(before)
    for shard in sorted((tmp_path / "a").glob("*.arrow")):
        whole = shard.read_bytes()
        shard.write_bytes(whole.replace(b"row 1", b"Row 1").replace(b"row 2", b"Row 2").replace(b"row", b"roW"))
        assert shard.read_bytes() != whole
        assert not set(keys(tmp_path / "a")) & set(before)
        shard.write_bytes(whole)


def test_a_model_is_fitted_and_tested_on_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEXMILL_CACHE", str(tmp_path / "cache"))
    data = rows(16)
    names = sorted({row["label"] for row in data})
    part = datasets.Dataset.from_list([{"text": row["text"], "label": names.index(row["label"])} for row in data])
    part = part.cast_column("label", datasets.ClassLabel(names=names))
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "set")
    stored(tiny_bert(), tmp_path / "bert")
    lm.fit(
        tmp_path / "set" / "train",
        test=tmp_path / "set" / "test",
        out=tmp_path / "a",
        model=tmp_path / "bert",
        epochs=1,
    )
    assert lm.load(tmp_path / "a").engine.task.labels()["label"] == tuple(names)
