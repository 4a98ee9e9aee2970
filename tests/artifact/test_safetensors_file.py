"""The safetensors header: what the library writes is accepted, what it would choke on is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from lexmill.artifact import read_header
from lexmill.errors import UserError


def test_a_written_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.zeros(0), "c": np.array(3, dtype=np.int8)}
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert header.keys() == tensors.keys()
    data = path.read_bytes()
    for name, array in tensors.items():
        assert header[name].shape == array.shape
        assert data[header[name].start : header[name].end] == array.tobytes()


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_header(path)
    assert caught.value.where == str(path)
    return caught.value.message


def test_truncation_at_any_byte_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"a": np.ones(3, np.float32), "b": np.ones(2, np.int8)}, path)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        refusal(path)
    path.write_bytes(data + b"\0")
    assert "header says" in refusal(path)


def entry(start: int, end: int, **changes: Any) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end], **changes}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(0, 4), "b": entry(2, 6)}, "'b' overlaps"),
        ({"a": entry(0, 2), "b": entry(4, 6)}, "'b' follows a hole"),
        ({"a": entry(0, 6, shape=[5])}, "'a' wrongly"),
        ({"a": entry(0, 6, dtype="OBJECT")}, "'a' wrongly"),
        ({"a": entry(0, 6, shape=[-2, -3])}, "'a' wrongly"),
        ({"a": entry(0, 6, shape="6")}, "'a' wrongly"),
        ({"a": entry(-6, 0)}, "overlaps"),
        ({"a": 3}, "'a' wrongly"),
        ([1], "not a table"),
        ('{"a": 1, "a": 2}', "twice"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_wrong_header_is_refused(tmp_path: Path, header: Any, message: str) -> None:
    path = tmp_path / "m.safetensors"
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(6))
    assert message in refusal(path)


def test_a_pickle_or_a_missing_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    assert "cannot be read" in refusal(path)
    path.write_bytes(b"PK\x03\x04" + b"\xff" * 50)
    assert "not a safetensors file" in refusal(path)
