"""What an engine runs: a task, a model and its tokenizer, from an artefact or straight from training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from lexmill import models
from lexmill.artifact import Artifact
from lexmill.data.tokenizer import check_vocabulary, load_tokenizer
from lexmill.errors import UserError
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
    model, tokenizer = models.load(artifact.path), load_tokenizer(artifact.path)
    check_vocabulary(tokenizer, model.config.vocab_size, where=str(artifact.path))
    return Loaded(_task(artifact), model, tokenizer, artifact.path.resolve().name)


def _task(artifact: Artifact) -> Task:
    stated, where = artifact.manifest.task, str(artifact.path / "manifest.json")
    try:
        return find(stated.name).from_state(stated.state)
    except UserError as error:
        raise UserError(error.message, where=where, hint=error.hint) from error
    except (KeyError, TypeError) as error:
        hint = "copy the artefact again, or go back to the run that made it"
        raise UserError(f"the state of the task '{stated.name}' is wrong: {error!r}", where=where, hint=hint) from error
