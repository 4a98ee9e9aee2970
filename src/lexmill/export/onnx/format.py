"""The format `onnx`: a graph from tokens to outputs, the tokenizer, and how outputs become answers."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lexmill.engine import Loaded, OnnxEngine, probes
from lexmill.engine.graph_engine import FILE
from lexmill.engine.graph_model import IDS, MASK, TYPES
from lexmill.errors import MissingExtra, UserError
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
        model = _graph(subject)
        _onnx().save(model, folder / FILE.name)
        inputs = [name for name in (IDS, MASK, TYPES) if any(one.name == name for one in model.graph.input)]
        write_beside(subject, folder, opset=model.opset_import[0].version, inputs=inputs)
        return [FILE.name]

    def evidence(self, subject: Loaded, file: Path, records: Sequence[Record]) -> list[Evidence]:
        check_beside(subject, file.parent)
        return list(probes.evidence_of(OnnxEngine(subject, file=file), records))

    def check(self, subject: Loaded, file: Path) -> None:
        if _constants(_onnx().load(file)) != _constants(_graph(subject)):
            hint = "export it anew"
            raise UserError("its constants are not the weights of the model", where=str(file), hint=hint)

    def tolerance(self, subject: Loaded, options: Any) -> float:
        return CODED if any(isinstance(layer, Int8Linear) for layer in subject.model.modules()) else 1e-5


def _onnx() -> Any:
    try:
        import onnx
    except ModuleNotFoundError as error:
        raise MissingExtra("onnx", "export to ONNX") from error
    return onnx


def _graph(subject: Loaded) -> Any:
    _onnx()
    from lexmill.export.onnx.model import written

    found = asked(subject)
    return written(subject.model, found.heads, found.pooling, f"{subject.name}: {subject.task.name}")


def _constants(model: Any) -> Counter[str]:
    """What numbers a graph holds, whatever they are called."""
    held = (_onnx().numpy_helper.to_array(one) for one in model.graph.initializer)
    return Counter(hashlib.sha256(f"{one.dtype} {one.shape}".encode() + one.tobytes()).hexdigest() for one in held)
