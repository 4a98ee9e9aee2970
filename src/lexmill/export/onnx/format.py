"""The format `onnx`: a graph from tokens to outputs, the tokenizer, and how outputs become answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from lexmill.data.batch import collate
from lexmill.data.tokenizer import fingerprint, load_tokenizer
from lexmill.engine import Loaded, probes
from lexmill.engine.onnx_engine import FILE, OnnxEngine
from lexmill.engine.onnx_model import IDS, MASK, TYPES
from lexmill.errors import MissingExtra, UserError
from lexmill.export.base import Evidence, Format, register
from lexmill.models import Model
from lexmill.nn.int8 import Int8Linear
from lexmill.nn.pooling import Pooling
from lexmill.tasks import Record

ANSWERS = "answers.json"
"""What a program needs to know to make answers of outputs."""
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class OnnxOptions:
    """There is nothing to set."""


@dataclass
class _Asked:
    """Stands in for a model, to learn what a task asks of it."""

    model: Model
    asked: list[str] = field(default_factory=list[str])
    pooling: Pooling | None = None

    @property
    def device(self) -> torch.device:
        return self.model.device

    def __call__(self, *inputs: Any, heads: Sequence[str] | None = None, **named: Any) -> Any:
        self.asked += list(self.model.heads if heads is None else heads)
        return self.model(*inputs, heads=heads, **named)

    def pooled(self, *inputs: Any, how: Pooling | None = None, **named: Any) -> Any:
        self.pooling = how or self.model.pooling
        return self.model.pooled(*inputs, how=how, **named)

    def __getattr__(self, name: str) -> Any:
        hint = "classify, tag, rank, embed and answer can; export this one in another format"
        raise UserError("what this task asks of its model cannot be one ONNX graph", where="export", hint=hint)


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
        asked = _asked(subject)
        model = written(subject.model, asked.asked, asked.pooling, f"{subject.name}: {subject.task.name}")
        onnx.save(model, folder / FILE.name)
        inputs = [name for name in (IDS, MASK, TYPES) if any(one.name == name for one in model.graph.input)]
        opset = model.opset_import[0].version
        told = {"task": subject.task.name, "opset": opset, "inputs": inputs, **subject.task.reading()}
        (folder / ANSWERS).write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", "utf-8")
        subject.tokenizer.no_truncation()
        subject.tokenizer.save(str(folder / TOKENIZER))
        return [FILE.name]

    def evidence(self, subject: Loaded, file: Path, records: Sequence[Record]) -> list[Evidence]:
        told = json.loads((file.parent / ANSWERS).read_text("utf-8"))
        for name, value in json.loads(json.dumps(subject.task.reading())).items():
            if told.get(name) != value:
                raise UserError(f"'{name}' is not what the task says", where=str(file.parent / ANSWERS))
        if fingerprint(load_tokenizer(file.parent / TOKENIZER)) != fingerprint(subject.tokenizer):
            raise UserError("the tokenizer is another one", where=str(file.parent / TOKENIZER))
        engine = OnnxEngine(subject, file=file)
        found: list[Evidence] = []
        for _, answer in engine.run_stream(records):
            if isinstance(answer, Exception):
                raise answer
            found.append(subject.task.evidence(answer))
        return found

    def tolerance(self, subject: Loaded, options: Any) -> float:
        # Where a number falls just between two codes, rounding decides, and may decide otherwise here. A few texts are
        # then answered noticeably differently, as they are by torch's own two kernels; most to within rounding.
        return 0.25 if any(isinstance(layer, Int8Linear) for layer in subject.model.modules()) else 1e-5


def _asked(subject: Loaded) -> _Asked:
    """What the task asks of its model for a text."""
    [record, *_] = probes.probe_records(subject.task)
    asked = _Asked(subject.model)
    with torch.inference_mode():
        batch = collate(subject.task.encode([record], subject.tokenizer, labelled=False))
        subject.task.answer(cast("Model", asked), batch, [record], subject.tokenizer)
    return asked
