"""Runs requests through the graph of an artefact: sorted by length, side by side with next to no padding."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, cast

from lexmill.artifact import Artifact
from lexmill.data.batch import collate
from lexmill.data.tokenizer import load_tokenizer
from lexmill.engine.base import Work
from lexmill.engine.graph_model import GraphModel
from lexmill.engine.loaded import Loaded, described_adapters, read_task
from lexmill.engine.runtime import Item, Runtime
from lexmill.errors import UserError
from lexmill.models import Model

FILE = PurePosixPath("onnx/model.onnx")
"""Where an artefact keeps the graph."""
TOKEN_BUDGET = 4096


class GraphEngine(Runtime):
    """An `Engine` for the `onnx/model.onnx` of an artefact; the model's own weights are not read.

    Args:
        source: an artefact, its path, or what is in memory, of which the task and the tokenizer are taken.
        file: the graph; the artefact's own where None.
        device: `cpu`.
        token_budget: most tokens that are taken together.
        threads: of the program that computes; as it has them where None.

    Raises:
        MissingExtra: that program is not installed.
        UserError: there is no graph, or it cannot be run.
    """

    form: ClassVar[str | None] = FILE.parts[0]
    title: ClassVar[str]
    """What people call the program."""

    def __init__(
        self,
        source: Artifact | Path | str | Loaded,
        *,
        file: Path | None = None,
        device: str = "cpu",
        token_budget: int | None = None,
        threads: int | None = None,
    ) -> None:
        if device != "cpu":
            hint = "leave it out"
            raise UserError(f"{self.title} runs on the CPU here, not on '{device}'", where="device", hint=hint)
        if isinstance(source, Loaded):
            if file is None:
                raise ValueError("what is in memory has no file of its own")
            graph, task, tokenizer, name = file, source.task, source.tokenizer, source.name
        else:
            artifact = source if isinstance(source, Artifact) else Artifact.open(Path(source))
            graph = file or artifact.path / FILE
            task = read_task(artifact.manifest.task, artifact.path / "manifest.json")
            tokenizer, name = load_tokenizer(artifact.path), artifact.path.resolve().name
            if described_adapters(artifact):
                hint = "run it in torch"
                raise UserError("an artefact with several adapters has no graph", where=str(artifact.path), hint=hint)
        self._graph = self._opened(graph, threads)
        super().__init__(
            Loaded(task, cast("Model", self._graph), tokenizer, name),
            TOKEN_BUDGET if token_budget is None else token_budget,
        )

    @classmethod
    @abstractmethod
    def _opened(cls, file: Path, threads: int | None) -> GraphModel: ...

    @classmethod
    def takes(cls, artifact: Artifact) -> bool:
        return (artifact.path / FILE).is_file() and not described_adapters(artifact)

    @property
    def work(self) -> Work:
        return self._graph.work

    @property
    def record(self) -> Mapping[str, Any]:
        return {"runtime": self.runtime, **self._graph.record}

    def _forward(self, items: Sequence[Item]) -> list[Any]:
        loaded, records = self._loaded, [item.record for item in items]
        batch, hear = collate([item.example for item in items]), [item.hear for item in items]
        if any(hear):
            return loaded.task.speak(loaded.model, batch, records, loaded.tokenizer, hear)
        return loaded.task.answer(loaded.model, batch, records, loaded.tokenizer)
