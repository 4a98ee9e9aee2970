"""A checkpoint written by one layout is read by another: pieces by offset, slices by global name."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lexmill.errors import UserError
from lexmill.train.checkpoint import Checkpoint, write


def cuts(size: int, parts: int) -> list[tuple[int, int]]:
    """`size` in `parts` of nearly equal length, some of which may be empty."""
    bounds = [size * i // parts for i in range(parts + 1)]
    return list(pairwise(bounds))


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    writers=st.integers(1, 4),
    readers=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
)
def test_rows_split_over_writers_are_read_by_columns(
    height: int, width: int, writers: int, readers: int, dtype: torch.dtype
) -> None:
    whole = torch.arange(height * width).reshape(height, width).to(dtype)
    blocks = [((start, 0), whole[start:stop]) for start, stop in cuts(height, writers) if stop > start]
    with TemporaryDirectory() as folder:
        path = Path(folder) / "step-00000007"
        write(path, 7, {"bias": whole[0].clone(), "count": torch.tensor(3)}, {"epoch": 1}, pieces={"weight": blocks})
        saved = Checkpoint(path)
        assert (saved.step, saved.state) == (7, {"epoch": 1})
        assert sorted(saved.names) == ["bias", "count", "weight"]
        assert saved.shape("weight") == (height, width)
        columns = [saved.read("weight", (slice(None), slice(start, stop))) for start, stop in cuts(width, readers)]
        assert torch.equal(torch.cat(columns, 1), whole)
        assert columns[0].dtype == dtype
        assert torch.equal(saved.read("weight"), whole)
        assert torch.equal(saved.read("bias"), whole[0])
        assert torch.equal(saved.read("count"), torch.tensor(3))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_block_of_a_grid_of_pieces_can_be_read(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(*[st.integers(1, 6)] * 3))
    whole = torch.arange(shape[0] * shape[1] * shape[2], dtype=torch.float32).reshape(shape)
    grid = [cuts(size, data.draw(st.integers(1, size))) for size in shape]
    blocks = [((a, b, c), whole[a:x, b:y, c:z]) for a, x in grid[0] for b, y in grid[1] for c, z in grid[2]]
    bounds = [sorted((data.draw(st.integers(0, size)), data.draw(st.integers(0, size)))) for size in shape]
    wanted = tuple(slice(*pair) for pair in bounds)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "step-00000001"
        write(path, 1, {}, {}, pieces={"w": data.draw(st.permutations(blocks))})
        assert torch.equal(Checkpoint(path).read("w", wanted), whole[wanted])


def test_a_flipped_bit_names_its_file(tmp_path: Path) -> None:
    write(tmp_path / "step-1", 1, {"w": torch.ones(100)}, {})
    file = tmp_path / "step-1" / "tensors-0.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"tensors-0\.safetensors: damaged"):
        Checkpoint(tmp_path / "step-1")


def test_tied_tensors_are_stored_once_and_read_by_each_name(tmp_path: Path) -> None:
    table = torch.randn(1000, 8)
    write(tmp_path / "step-1", 1, {"table": table, "head": table.view(1000, 8), "part": table[:500].clone()}, {})
    saved = Checkpoint(tmp_path / "step-1")
    assert torch.equal(saved.read("table"), table)
    assert torch.equal(saved.read("head"), table)
    assert (tmp_path / "step-1" / "tensors-0.safetensors").stat().st_size < 1.6 * table.nbytes


def test_groups_are_read_by_prefix(tmp_path: Path) -> None:
    write(tmp_path / "step-1", 1, {"model.a": torch.ones(2), "model.b": torch.zeros(1), "other": torch.ones(1)}, {})
    assert {n: t.tolist() for n, t in Checkpoint(tmp_path / "step-1").group("model").items()} == {"a": [1, 1], "b": [0]}
