"""Checkpoints: safetensors and JSON, every tensor by global name, so that any layout can read its slices.

```
checkpoints/step-00000312/
  index.json           step, the run's state, and per tensor: dtype, global shape, and the pieces it is stored in
  tensors-0.safetensors
```
A checkpoint is written beside its final name and renamed when it is on disk, so a killed run leaves a whole one or
none.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lexmill.artifact.tree import measure, sync_folder
from lexmill.errors import Failure, UserError

FORMAT = 1


@dataclass(frozen=True)
class Piece:
    """A block of a tensor: `shape` elements from `offset` on, along every axis of the global tensor."""

    file: str
    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]


class Checkpoint:
    """A checkpoint on disk, open for reading. Raises `UserError` if a file is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            index = json.loads((path / "index.json").read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"not a readable checkpoint: {error}", where=str(path)) from error
        if index["format"] != FORMAT:
            raise UserError(
                f"checkpoint format {index['format']}, this version reads {FORMAT}",
                where=str(path),
                hint="resume with the version of lexmill that wrote it",
            )
        for name, digest in index["files"].items():
            if measure(path / name).sha256 != digest:
                raise UserError("damaged: its content differs from when it was written", where=str(path / name))
        self.step: int = index["step"]
        self.state: dict[str, Any] = index["state"]
        self._tensors: dict[str, Any] = index["tensors"]

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name]["shape"])

    def read(self, name: str, slices: Sequence[slice] | None = None) -> Tensor:
        """A tensor by global name, or the block of it that `slices` (one an axis, step 1) cut out."""
        shape = self.shape(name)
        bounds = [s.indices(n)[:2] for s, n in zip(slices or [slice(None)] * len(shape), shape, strict=True)]
        out = torch.empty([stop - start for start, stop in bounds], dtype=getattr(torch, self._tensors[name]["dtype"]))
        for raw in self._tensors[name]["pieces"]:
            piece = Piece(raw["file"], raw["key"], tuple(raw["offset"]), tuple(raw["shape"]))
            self._copy(piece, bounds, out)
        return out

    def _copy(self, piece: Piece, bounds: Sequence[tuple[int, int]], out: Tensor) -> None:
        source: list[slice] = []
        target: list[slice] = []
        for (start, stop), offset, size in zip(bounds, piece.offset, piece.shape, strict=True):
            low, high = max(start, offset), min(stop, offset + size)
            if low >= high:
                return
            source.append(slice(low - offset, high - offset))
            target.append(slice(low - start, high - start))
        with safe_open(self.path / piece.file, framework="pt") as file:
            out[tuple(target)] = file.get_slice(piece.key)[tuple(source)] if source else file.get_tensor(piece.key)

    def group(self, prefix: str) -> dict[str, Tensor]:
        """All tensors whose name starts with `prefix.`, without it."""
        return {n.removeprefix(f"{prefix}."): self.read(n) for n in self.names if n.startswith(f"{prefix}.")}


def write(
    path: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    pieces: Mapping[str, Sequence[tuple[tuple[int, ...], Tensor]]] | None = None,
) -> None:
    """Write a checkpoint at `path`. Tied tensors are stored once, under each of their names.

    Args:
        tensors: whole tensors by global name.
        state: the run's own state, as JSON.
        pieces: tensors of which this process holds blocks, as `(offset, block)`, by global name.
    """
    partial = path.with_name(path.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    blocks = {name: [((0,) * t.dim(), t)] for name, t in tensors.items()}
    blocks |= {name: list(parts) for name, parts in (pieces or {}).items()}
    file = "tensors-0.safetensors"
    stored: dict[str, Tensor] = {}
    key_of: dict[tuple[Any, ...], str] = {}
    index: dict[str, Any] = {}
    for name, parts in blocks.items():
        listed: list[dict[str, Any]] = []
        for i, (offset, block) in enumerate(parts):
            tied = (block.device, block.data_ptr(), block.shape, block.stride()) if block.numel() else (name, i)
            key = key_of.setdefault(tied, name if len(parts) == 1 else f"{name}#{i}")
            if key not in stored:
                stored[key] = block.detach().contiguous().cpu()
            listed.append({"file": file, "key": key, "offset": list(offset), "shape": list(block.shape)})
        ends = [[o + s for o, s in zip(p["offset"], p["shape"], strict=True)] for p in listed]
        index[name] = {
            "dtype": str(parts[0][1].dtype).removeprefix("torch."),
            "shape": [max(axis) for axis in zip(*ends, strict=True)],
            "pieces": listed,
        }
    save_file(stored, partial / file)
    content = {
        "format": FORMAT,
        "step": step,
        "state": dict(state),
        "files": {file: measure(partial / file, sync=True).sha256},
        "tensors": index,
    }
    (partial / "index.json").write_text(json.dumps(content))
    measure(partial / "index.json", sync=True)
    sync_folder(partial)
    partial.rename(path)
    sync_folder(path.parent)


class Store:
    """The checkpoints of one run, in one folder; keeps the latest few."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write the checkpoint of `step`, then drop the oldest beyond `keep`."""
        path = self.folder / f"step-{step:08d}"
        if path.exists():
            return
        try:
            write(path, step, tensors, state)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(path.with_name(path.name + ".partial"), ignore_errors=True)
            raise Failure(
                f"could not write the checkpoint of step {step}: {error}",
                where=str(path),
                hint="free some space, then go on with --resume; the checkpoints before this one are whole",
            ) from error
        for old in self._paths()[: -self.keep]:
            doomed = old.rename(old.with_name(old.name + ".partial"))
            shutil.rmtree(doomed)

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint, or None. What a kill left half-written is removed."""
        for torn in self.folder.glob("*.partial"):
            shutil.rmtree(torn)
        paths = self._paths()
        return Checkpoint(paths[-1]) if paths else None

    def _paths(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("step-*") if p.suffix != ".partial")
