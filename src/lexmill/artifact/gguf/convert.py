"""From a GGUF file to a Hugging Face directory, tensor by tensor."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lexmill.artifact.gguf import architectures, tokenizer
from lexmill.artifact.gguf.source import Source
from lexmill.artifact.tree import sync_folder
from lexmill.artifact.write import is_disk_full, partial_path, refuse_existing
from lexmill.errors import Failure, UserError


@dataclass(frozen=True)
class Imported:
    """What was imported.

    Args:
        stored: how many tensors the file held in each kind of number.
    """

    directory: str
    architecture: str
    weights: int
    vocabulary: int
    chat_template: bool
    stored: dict[str, int]

    def lines(self) -> list[str]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.stored.items())
        chat = "a chat template" if self.chat_template else "no chat template"
        return [
            f"{self.architecture}: {self.weights:,} weights, dequantised to float32 (tensors: {kinds})",
            f"tokenizer: {self.vocabulary:,} tokens, {chat}",
            f"wrote {self.directory}",
        ]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def import_gguf(file: Path | str, out: Path | str, *, progress: Callable[[int], None] | None = None) -> Imported:
    """Write a GGUF file as a Hugging Face directory: `config.json`, `model.safetensors` (float32, dequantised) and the
    tokenizer with its chat template. At most one tensor is held in memory.

    Args:
        out: must not exist; it appears when it is whole.
        progress: told how many tensors are done.

    Raises:
        UserError: `out` exists; the file is broken, truncated, or of an architecture, quantisation or tokenizer that
            cannot be imported.
        Failure: where the disk is full.
        MissingExtra: the package `gguf` is not installed.
    """
    source, out = Source(Path(file)), Path(os.path.abspath(out))
    architecture = architectures.find(source)
    config = architectures.config(source, architecture) | tokenizer.special_ids(source)
    placed = architectures.placed(source, architecture, config["num_hidden_layers"])
    words, described = tokenizer.rebuild(source)
    if words.get_vocab_size() > config["vocab_size"]:
        why = f"has {words.get_vocab_size()} tokens, but {config['vocab_size']} embeddings"
        raise UserError(why, where=str(source.path), hint="fetch the file again")
    with _appearing(out) as folder:
        _write_json(folder / "config.json", config)
        _write_json(folder / "tokenizer_config.json", described)
        words.save(str(folder / "tokenizer.json"))
        _write_weights(folder / "model.safetensors", source, placed, architecture, config, progress)
    weights = sum(math.prod(source.shape(name)) for name in placed)
    size, chat = words.get_vocab_size(), "chat_template" in described
    return Imported(str(out), architecture.model_type, weights, size, chat, source.kinds)


@contextmanager
def _appearing(out: Path) -> Generator[Path]:
    """A folder beside `out` that becomes it when the block ends well, and is deleted otherwise."""
    refuse_existing(out, resume=True)
    folder = partial_path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except FileExistsError as error:
        hint = "another import may be writing it; otherwise remove it"
        raise UserError("already exists", where=str(folder), hint=hint) from error
    try:
        yield folder
        refuse_existing(out, resume=True)
        folder.rename(out)
        sync_folder(out.parent)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if is_disk_full(error):
            raise Failure("disk full", where=str(folder), hint="free some space; nothing was left behind") from error
        raise


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _write_weights(
    path: Path,
    source: Source,
    placed: Mapping[str, str],
    architecture: architectures.Architecture,
    config: Mapping[str, Any],
    progress: Callable[[int], None] | None,
) -> None:
    """A safetensors file, of which no more than one tensor is in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, theirs in placed.items():
        start, end = end, end + 4 * math.prod(source.shape(name))
        header[theirs] = {"dtype": "F32", "shape": source.shape(name), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for done, name in enumerate(placed, 1):
            values = architecture.restored(name, source.read(name), config)
            file.write(np.ascontiguousarray(values, "<f4").data)
            if progress is not None:
                progress(done)
        file.flush()
        os.fsync(file.fileno())
