"""The format `onnx`: a graph from tokens to outputs, the tokenizer, and how outputs become answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lexmill.engine import Loaded, OnnxEngine, probes
from lexmill.engine.graph_engine import FILE
from lexmill.engine.graph_model import IDS, MASK, TYPES
from lexmill.errors import MissingExtra
from lexmill.export.base import Evidence, Format, register
from lexmill.export.graphs import asked, check_beside, write_beside
from lexmill.export.parity import CODED
from lexmill.nn.int8 import Int8Linear
from lexmill.tasks import Record


@dataclass(frozen=True)
class OnnxOptions:
    """There is nothing to set."""


@register
class Onnx(Format):
    """`model.onnx`, opset 20, with free batch and length; `tokenizer.json`; `answers.json`."""

    name = "onnx"
    about = "a graph for ONNX Runtime and others, from token ids to outputs, with tokenizer and labels"
    Options = OnnxOptions

    def write(self, subject: Loaded, folder: Path, options: Any) -> Sequence[str]:
        try:
            import onnx

            from lexmill.export.onnx.model import written
        except ModuleNotFoundError as error:
            raise MissingExtra("onnx", "export to ONNX") from error
        found = asked(subject)
        model = written(subject.model, found.heads, found.pooling, f"{subject.name}: {subject.task.name}")
        onnx.save(model, folder / FILE.name)
        inputs = [name for name in (IDS, MASK, TYPES) if any(one.name == name for one in model.graph.input)]
        write_beside(subject, folder, opset=model.opset_import[0].version, inputs=inputs)
        return [FILE.name]

    def evidence(self, subject: Loaded, file: Path, records: Sequence[Record]) -> list[Evidence]:
        check_beside(subject, file.parent)
        return list(probes.evidence_of(OnnxEngine(subject, file=file), records))

    def tolerance(self, subject: Loaded, options: Any) -> float:
        return CODED if any(isinstance(layer, Int8Linear) for layer in subject.model.modules()) else 1e-5
