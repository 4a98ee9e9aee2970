"""Datasets as Hugging Face `datasets` saves them (`save_to_disk`): Arrow shards, streamed with pyarrow alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lexmill.errors import UserError

SPLITS, INFO, STATE = "dataset_dict.json", "dataset_info.json", "state.json"
_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
"""What an Arrow stream ends with. A stream cut between two batches would otherwise read as a shorter one."""
_SLICE = 1024
_LISTS = ("Sequence", "List", "LargeList")
_PLAIN = ("Value", "Translation")

Convert = Callable[[Any], Any]


def is_saved(path: Path) -> bool:
    """Whether a directory is one saved dataset."""
    return (path / STATE).is_file() and (path / INFO).is_file()


def splits(path: Path) -> list[str]:
    """The names of the splits that a saved `DatasetDict` holds; none of anything else."""
    if not (path / SPLITS).is_file():
        return []
    found = _object(path / SPLITS).get("splits")
    return [str(name) for name in found] if isinstance(found, list) else []


def files(path: Path) -> list[Path]:
    """The files that decide the rows: the features, then the shards in their order.

    Raises:
        UserError: the list of shards is broken, or one is missing.
    """
    listed = _object(path / STATE).get("_data_files")
    names = [entry.get("filename") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError("does not list the shards beside it", where=str(path / STATE), hint="save the dataset again")
    shards = [path / str(name) for name in names]
    for shard in shards:
        if not shard.is_file():
            hint = f"{path / STATE} lists {len(shards)}; copy the whole directory"
            raise UserError("this shard is missing", where=str(shard), hint=hint)
    return [path / INFO, *shards]


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows, labels of a fixed set by their names; a label of -1, which `datasets` means as none, is `None`.

    Raises:
        UserError: a broken or cut shard, a column that holds no text, number or label, or a label without a name.
    """
    info, *shards = files(path)
    features = _object(info).get("features")
    if not isinstance(features, dict) or not features:
        raise UserError("names no features", where=str(info), hint="save the dataset again")
    converts = {name: _convert(feature, f"{info}, column '{name}'") for name, feature in features.items()}
    changed = {name: convert for name, convert in converts.items() if convert is not None}
    for shard in shards:
        for values in _shard_rows(shard, set(features)):
            for name, convert in changed.items():
                values[name] = convert(values[name])
            yield values


def _shard_rows(shard: Path, columns: set[str]) -> Iterator[dict[str, Any]]:
    import pyarrow as pa

    hint = "copy the shard again, or save the dataset again"
    try:
        with shard.open("rb") as file:
            file.seek(-min(len(_END), shard.stat().st_size), 2)
            if file.read() != _END:
                raise UserError("this shard is cut off", where=str(shard), hint=hint)
        with pa.OSFile(str(shard)) as stream, pa.ipc.open_stream(stream) as reader:
            if set(reader.schema.names) != columns or len(reader.schema.names) != len(columns):
                raise UserError(f"its columns are not those of {INFO}", where=str(shard), hint=hint)
            for batch in reader:
                for start in range(0, batch.num_rows, _SLICE):
                    yield from batch.slice(start, _SLICE).to_pylist()
    except (pa.ArrowException, OSError) as error:
        message = f"not an Arrow stream that can be read: {str(error).splitlines()[0]}"
        raise UserError(message, where=str(shard), hint=hint) from error


def _convert(feature: Any, where: str) -> Convert | None:
    """What turns a stored value into the one meant; `None` where they are the same."""
    if isinstance(feature, list) and len(feature) == 1:
        return _each(_convert(feature[0], where))
    if isinstance(feature, dict) and "_type" not in feature:
        return _fields({name: _convert(inner, where) for name, inner in feature.items()})
    stated: dict[str, Any] = feature if isinstance(feature, dict) else {"_type": feature}
    kind = stated["_type"]
    if kind in _PLAIN:
        return None
    if kind == "ClassLabel" and isinstance(stated.get("names"), list):
        return _named([str(name) for name in stated["names"]], where)
    if kind in _LISTS:
        inner = stated.get("feature")
        if isinstance(inner, dict) and "_type" not in inner:  # stored as a field of lists each
            return _fields({name: _each(_convert(one, where)) for name, one in inner.items()})
        return _each(_convert(inner, where))
    hint = "read are text, numbers, labels and lists of them; leave it out with remove_columns and save again"
    raise UserError(f"a feature of type '{kind}' cannot be read", where=where, hint=hint)


def _named(names: list[str], where: str) -> Convert:
    def convert(index: int | None) -> str | None:
        if index is None or index == -1:
            return None
        if not 0 <= index < len(names):
            raise UserError(f"label {index} has no name", where=where, hint=f"there are {len(names)} names")
        return names[index]

    return convert


def _each(convert: Convert | None) -> Convert | None:
    if convert is None:
        return None
    return lambda values: None if values is None else [convert(value) for value in values]


def _fields(converts: Mapping[str, Convert | None]) -> Convert | None:
    changed = {name: convert for name, convert in converts.items() if convert is not None}
    if not changed:
        return None
    return lambda values: (
        None if values is None else {**values, **{name: convert(values[name]) for name, convert in changed.items()}}
    )


def _object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read: {error}", where=str(file), hint="save the dataset again") from error
    if not isinstance(found, dict):
        raise UserError("is not a JSON object", where=str(file), hint="save the dataset again")
    return found
