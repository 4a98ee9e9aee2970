"""The format `torch`: the forward pass as a `torch.export` package, which plain torch loads and runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from lexmill.engine import Loaded, probes
from lexmill.export.base import Evidence, Format, register
from lexmill.export.graphs import ANSWERS, check_beside, write_beside
from lexmill.export.traced import Program, traced
from lexmill.models import Model
from lexmill.tasks import Record

FILE = "model.pt2"


@dataclass(frozen=True)
class TorchExportOptions:
    """There is nothing to set."""


@register
class TorchExport(Format):
    """`model.pt2` with free batch and length, `tokenizer.json`, `answers.json`."""

    name = "torch"
    about = "a torch.export package from token ids to outputs, for programs with torch alone"
    Options = TorchExportOptions

    def write(self, subject: Loaded, folder: Path, options: Any) -> Sequence[str]:
        program, inputs = traced(subject, "a torch.export package")
        torch.export.save(program, folder / FILE)
        write_beside(subject, folder, inputs=inputs)
        return [FILE]

    def evidence(self, subject: Loaded, file: Path, records: Sequence[Record]) -> list[Evidence]:
        check_beside(subject, file.parent)
        inputs = json.loads((file.parent / ANSWERS).read_text("utf-8"))["inputs"]
        stand_in = cast("Model", Program(torch.export.load(file).module(), inputs))
        return probes.evidence(replace(subject, model=stand_in), records)
