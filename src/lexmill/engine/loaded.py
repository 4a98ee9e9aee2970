"""What an engine runs: a task, a model and its tokenizer, from an artefact or straight from training."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer

from lexmill import models
from lexmill.adapt import add_adapter, using
from lexmill.artifact import Artifact, TaskRecord
from lexmill.data.tokenizer import check_vocabulary, load_tokenizer
from lexmill.errors import UserError
from lexmill.models import Model
from lexmill.tasks import find
from lexmill.tasks.base import Task

ADAPTERS = "adapters"
"""The key of a manifest's structure, and the folder, of the adapters that share the artefact's trunk."""


@dataclass(frozen=True)
class Loaded:
    """A task and the model and tokenizer that do it; `name` is what requests and answers call it.

    Args:
        adapters: by name, what else the trunk does with an adapter; the models share it.
        adapter: the name of the adapter that this one is for.
        path: the directory that it was read from.
    """

    task: Task
    model: Model
    tokenizer: Tokenizer
    name: str = "model"
    adapters: Mapping[str, Loaded] = field(default_factory=dict[str, "Loaded"])
    adapter: str | None = None
    path: Path | None = None

    def of(self, adapter: str | None) -> Loaded:
        """What answers with this adapter. A `UserError` where there is none of the name, or none was named and the
        model does nothing without."""
        known = f"known adapters: {', '.join(self.adapters)}" if self.adapters else "it has none"
        if adapter is not None and adapter not in self.adapters:
            raise UserError(f"unknown adapter '{adapter}'", where="adapter", hint=known)
        if adapter is None and self.adapters and not self.model.heads:
            raise UserError("this model answers with an adapter only", where="adapter", hint=f"name one; {known}")
        return self if adapter is None else self.adapters[adapter]

    @contextmanager
    def acting(self) -> Generator[Model]:
        """The model, with its adapter acting where it has one among several."""
        if self.adapter is None and not self.adapters:
            yield self.model
            return
        with using(self.model.trunk, self.adapter):
            yield self.model


def load(source: Artifact | Path | str) -> Loaded:
    """Read an artefact, its hashes checked. Raises `UserError` where it is damaged or of an unknown task."""
    artifact = source if isinstance(source, Artifact) else Artifact.open(Path(source))
    model, tokenizer = models.load(artifact.path), load_tokenizer(artifact.path)
    check_vocabulary(tokenizer, model.config.vocab_size, where=str(artifact.path))
    name, where = artifact.path.resolve().name, artifact.path / "manifest.json"
    task = read_task(artifact.manifest.task, where)
    adapters: dict[str, Loaded] = {}
    for adapter, entry in described_adapters(artifact).items():
        own = add_adapter(model, adapter, artifact.path / ADAPTERS / adapter, entry["heads"])
        record = TaskRecord(name=entry["task"]["name"], state=entry["task"]["state"])
        adapters[adapter] = Loaded(read_task(record, where), own, tokenizer, name, adapter=adapter)
    return Loaded(task, model, tokenizer, name, adapters, path=artifact.path)


def described_adapters(artifact: Artifact) -> Mapping[str, Any]:
    """By name, the `task` and `heads` of each adapter, as the manifest has them."""
    return cast("Mapping[str, Any]", artifact.manifest.structure.get(ADAPTERS, {}))


def read_task(stated: TaskRecord, where: Path) -> Task:
    """The task of a manifest at `where`. A `UserError` where it is unknown, or its state is wrong."""
    try:
        return find(stated.name).from_state(stated.state)
    except UserError as error:
        raise UserError(error.message, where=str(where), hint=error.hint) from error
    except (KeyError, TypeError) as error:
        hint = "copy the artefact again, or go back to the run that made it"
        what = f"the state of the task '{stated.name}' is wrong: {error!r}"
        raise UserError(what, where=str(where), hint=hint) from error
