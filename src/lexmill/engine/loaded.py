"""What an engine runs: a task, a model and its tokenizer, from an artefact or straight from training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from lexmill import models
from lexmill.artifact import Artifact
from lexmill.data.tokenizer import load_tokenizer
from lexmill.models import Model
from lexmill.tasks import find
from lexmill.tasks.base import Task


@dataclass(frozen=True)
class Loaded:
    """A task and the model and tokenizer that do it; `name` is what requests and answers call it."""

    task: Task
    model: Model
    tokenizer: Tokenizer
    name: str = "model"


def load(source: Artifact | Path | str) -> Loaded:
    """Read an artefact, its hashes checked. Raises `UserError` where it is damaged or of an unknown task."""
    artifact = source if isinstance(source, Artifact) else Artifact.open(Path(source))
    stated = artifact.manifest.task
    task = find(stated.name).from_state(stated.state)
    return Loaded(task, models.load(artifact.path), load_tokenizer(artifact.path), artifact.path.resolve().name)
