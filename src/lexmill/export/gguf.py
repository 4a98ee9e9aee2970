"""The format `gguf`: one file for llama.cpp and what is built on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from lexmill.artifact.gguf import Kind, export_gguf, import_gguf
from lexmill.engine import Loaded
from lexmill.errors import UserError
from lexmill.export.base import Evidence, Format, register
from lexmill.export.huggingface import plain_evidence, write_plain
from lexmill.tasks import Record

FILE = "model.gguf"
_KINDS: dict[torch.dtype, Kind] = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class GgufOptions:
    """There is nothing to set."""


@register
class Gguf(Format):
    """`model.gguf`: weights as exact as the model has them, tokenizer, chat template."""

    name = "gguf"
    about = "one file for llama.cpp, of a decoder with its tokenizer and chat template"
    Options = GgufOptions

    def write(self, subject: Loaded, folder: Path, options: Any) -> Sequence[str]:
        kind = _KINDS.get(subject.model.dtype)
        if kind is None:
            raise UserError(f"GGUF has no numbers of the kind {subject.model.dtype}", where="export")
        with TemporaryDirectory(dir=folder) as plain:
            write_plain(subject, Path(plain))
            try:
                export_gguf(Path(plain), folder / FILE, kind)
            except UserError as fault:  # of a folder that nobody will find again
                where = (fault.where or "").replace(plain, "").strip("/")
                raise UserError(fault.message, where=where or "export", hint=fault.hint) from fault
        return [FILE]

    def evidence(self, subject: Loaded, file: Path, records: Sequence[Record]) -> list[Evidence]:
        with TemporaryDirectory() as found:
            import_gguf(file, Path(found) / "plain")
            return plain_evidence(subject, Path(found) / "plain", records, subject.model.dtype)
