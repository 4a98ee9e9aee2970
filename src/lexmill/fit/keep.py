"""Whether a run keeps the activations below its lowest trained layer, and what that saved."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

from lexmill.errors import Failure, UserError
from lexmill.fit.config import FitConfig
from lexmill.models import Model
from lexmill.tasks import Task
from lexmill.train import HeadStart, TrainResult, keep_activations, kept_bytes
from lexmill.train.kept import Dataset


@contextmanager
def kept(
    model: Model, task: Task, data: Dataset, config: FitConfig, folder: Path, note: Callable[[str], None]
) -> Generator[tuple[Dataset, HeadStart]]:
    """The examples with what the untrained layers make of them, where the config has that kept; else as they are.

    Raises:
        UserError: it is insisted on, and there is nothing to keep, or nothing to gain, or no room.
    """
    layers, size = model.untrained_layers(), kept_bytes(model, data, config.adapt.keep_precision)
    hindrance = _hindrance(layers, task, size, config)
    if hindrance and config.adapt.keep_activations:
        hint = "leave it out, and they are kept where they can be"
        raise UserError(f"no activations can be kept: {hindrance}", where="adapt.keep_activations", hint=hint)
    if hindrance or config.adapt.keep_activations is False:
        if layers and hindrance:
            note(f"not keeping the activations below the trained layers: {hindrance}")
        yield data, HeadStart()
        return
    note(f"running the {_lowest(layers)} once, without dropout, and keeping what they give: {size / 1e6:,.1f} MB")
    stored, precision = config.adapt.keep_precision, config.train.precision
    with keep_activations(model, data, layers, folder, stored=stored, precision=precision) as found:
        yield found, found.start


def _hindrance(layers: int, task: Task, size: int, config: FitConfig) -> str | None:
    if not layers:
        return "training reaches down to the lowest layer or the embeddings"
    if task.redraws:
        return "the task changes its texts from epoch to epoch"
    if config.train.adversarial != "none":
        return "adversarial training moves the word vectors"
    if config.train.epochs == 1:
        return "in one epoch every example comes only once"
    if size > config.adapt.keep_gigabytes * 1e9:
        return f"they take {size / 1e9:.1f} GB, more than adapt.keep_gigabytes = {config.adapt.keep_gigabytes:g}"
    return None


def _lowest(layers: int) -> str:
    return f"lowest {layers} layers" if layers > 1 else "lowest layer"


def keeping_effect(start: HeadStart, training: TrainResult) -> dict[str, float]:
    """For the run's record: what was kept, and what that cost. What it saved stands in `forward_known`, the share of
    all passes of a token through a layer that training did not have to compute.

    Raises:
        Failure: it saved nothing, since the task gives the model other tokens than those of the examples.
    """
    if not start.layers:
        return {}
    if not training.acted.get("forward_known"):
        hint = "set adapt.keep_activations=false: this task changes its texts, and does not say so (`redraws`)"
        raise Failure("the activations that were kept were of no use", where="adapt.keep_activations", hint=hint)
    return {
        "kept_layers": float(start.layers),
        "kept_bytes": float(start.bytes),
        "kept_seconds": start.seconds,
        "kept_positions": start.positions,
    }
