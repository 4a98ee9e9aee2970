"""The numbers a model gives to public probe texts: recorded at training, compared by `verify`.

Everything here takes the slow and obvious way, one probe at a time, so that it is an oracle for the engines.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from tokenizers import Tokenizer

from lexmill.data.batch import collate
from lexmill.engine.loaded import Loaded
from lexmill.engine.runtime import Runtime
from lexmill.errors import UserError
from lexmill.models import Model
from lexmill.tasks.base import Record, Task

FILE = "probes.json"
"""Where an artefact keeps what `record` gives."""
FORMAT = 1
_SHARES = (1, 2, 4, 8, 16, 32, 64, 128)
"""By which whole texts are divided until a model has room for all of them."""


def probe_texts() -> list[str]:
    """Bundled public texts: one word to more than 700, either case, accents, punctuation, emoji, several scripts."""
    bundled = json.loads(files("lexmill.engine").joinpath("probes.json").read_text(encoding="utf-8"))
    return [probe["text"] for probe in bundled["probes"]]


def stored_in(path: Path, adapters: Iterable[str]) -> dict[str | None, Path]:
    """The files of an artefact with what its model gave, and with what it gave with each adapter, by the name of that.
    A trunk with adapters may give nothing without."""
    own = {name: path / "adapters" / name / FILE for name in adapters}
    return {**({None: path / FILE} if not own or (path / FILE).is_file() else {}), **own}


def probe_request(task: Task) -> BaseModel:
    """The request, with `raw` set, that asks a task about every probe text."""
    return task.probe(probe_texts())


def probe_records(task: Task) -> list[Record]:
    """The records of `probe_request`."""
    return task.items(probe_request(task))


def evidence(loaded: Loaded, records: Sequence[Record]) -> list[dict[str, float]]:
    """The evidence behind each record's answer, in evaluation mode; the model's mode is as before afterwards."""
    task, model, tokenizer = loaded.task, loaded.model, loaded.tokenizer
    training = model.training
    model.eval()
    try:
        found: list[dict[str, float]] = []
        with torch.inference_mode(), loaded.acting():
            for one in records:
                batch = collate(task.encode([one], tokenizer, labelled=False))
                (answer,) = task.answer(model, batch, [one], tokenizer)
                found.append(task.evidence(answer))
        return found
    finally:
        model.train(training)


def evidence_of(engine: Runtime, records: Sequence[Record]) -> list[dict[str, float]]:
    """The evidence behind each record's answer as an engine gives it. Raises what stands in an answer's place."""
    found: list[dict[str, float]] = []
    for _, answer in engine.run_stream(records):
        if isinstance(answer, Exception):
            raise answer
        found.append(engine.task.evidence(answer))
    return found


def record(task: Task, model: Model, tokenizer: Tokenizer) -> dict[str, Any]:
    """What `verify` compares with later, as JSON for an artefact's `probes.json`: the request, the records it holds,
    and the evidence behind each answer of the model as it stands in memory, its floats exact."""
    request, found = _answerable(Loaded(task, model, tokenizer))
    records = task.items(request)
    return {
        "format": FORMAT,
        "request": request.model_dump(mode="json"),
        "probes": [{"record": dict(one), "evidence": e} for one, e in zip(records, found, strict=True)],
    }


def _answerable(loaded: Loaded) -> tuple[BaseModel, list[dict[str, float]]]:
    """The request and the evidence; of shorter texts, where the model has no room for the whole ones."""
    texts = probe_texts()
    for share in _SHARES:
        request = loaded.task.probe([text[: -(-len(text) // share)] for text in texts])
        try:
            return request, evidence(loaded, loaded.task.items(request))
        except UserError:
            if share == _SHARES[-1]:
                raise
    raise AssertionError("the last share returns or raises")
