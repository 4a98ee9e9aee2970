"""Events to the programs that people compare runs with: TensorBoard, MLflow, Weights & Biases. None needs a network."""

from __future__ import annotations

import hashlib
import logging
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lexmill.errors import MissingExtra
from lexmill.monitor.events import Event, Sink

Tracker = Literal["tensorboard", "mlflow", "wandb"]


def open_trackers(
    names: Sequence[Tracker], folder: Path, run: str, settings: Mapping[str, Any], *, last_step: int = -1
) -> list[Sink]:
    """The sinks of these names, all under `folder`.

    Args:
        run: what the run is called there; the same name goes on with a run that was interrupted.
        settings: kept with the run, flat: names to numbers and texts.
        last_step: of the checkpoint resumed from; -1 for a new run.

    Raises:
        MissingExtra: where the program's package is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    opened: list[Sink] = []
    for name in names:
        try:
            opened.append(_TRACKERS[name](folder, run, settings, last_step))
        except ImportError as error:
            raise MissingExtra("track", f"tracking by {name}") from error
    return opened


def _numbers(event: Event) -> tuple[int, dict[str, float]]:
    """An event's step, and its numbers as `phase/name`."""
    phase, step = event.get("phase", "run"), event.get("step", 0)
    found = {
        f"{phase}/{name}": float(value)
        for name, value in event.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and name not in ("step", "steps")
    }
    return step if isinstance(step, int) else 0, found


class TensorBoardSink:
    """Event files in `FOLDER/tensorboard/RUN`; look at them with `tensorboard --logdir FOLDER/tensorboard`."""

    def __init__(self, folder: Path, run: str, settings: Mapping[str, Any], last_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard" / run), purge_step=last_step + 1)
        self._writer.add_text("settings", "\n".join(f"- {name}: {value}" for name, value in settings.items()))

    def emit(self, event: Event) -> None:
        step, numbers = _numbers(event)
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class MLflowSink:
    """Runs of the experiment `lexmill` in `FOLDER/mlflow.db`; look with `mlflow ui --backend-store-uri sqlite:///…`."""

    def __init__(self, folder: Path, run: str, settings: Mapping[str, Any], last_step: int) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        with _quiet():
            self._client = MlflowClient(tracking_uri=f"sqlite:///{(folder / 'mlflow.db').resolve()}")
            found = self._client.get_experiment_by_name("lexmill")
            experiment = found.experiment_id if found else self._client.create_experiment("lexmill")
            going = self._client.search_runs([experiment], f"tags.`mlflow.runName` = '{run}'", max_results=1)
            resumed = going if last_step >= 0 else []
            self._id = (resumed[0] if resumed else self._client.create_run(experiment, run_name=run)).info.run_id
            if not resumed:
                params = [Param(name, str(value)[:500]) for name, value in settings.items()]
                self._client.log_batch(self._id, params=params)

    def emit(self, event: Event) -> None:
        step, numbers = _numbers(event)
        now = int(time.time() * 1000)
        with _quiet():
            self._client.log_batch(self._id, [self._metric(name, value, now, step) for name, value in numbers.items()])

    def close(self) -> None:
        with _quiet():
            self._client.set_terminated(self._id)


class WandbSink:
    """An offline run under `FOLDER/wandb`; `wandb sync` sends it, where somebody wants that."""

    def __init__(self, folder: Path, run: str, settings: Mapping[str, Any], last_step: int) -> None:
        import wandb

        quiet = wandb.Settings(
            silent=True, disable_git=True, save_code=False, console="off", x_disable_stats=True, x_disable_meta=True
        )
        identity = hashlib.sha256(str((folder / run).resolve()).encode()).hexdigest()[:16]
        self._run = wandb.init(
            project="lexmill", name=run, id=identity, dir=str(folder), mode="offline", config=dict(settings),
            settings=quiet,
        )  # fmt: skip

    def emit(self, event: Event) -> None:
        step, numbers = _numbers(event)
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()


@contextmanager
def _quiet() -> Generator[None]:
    """MLflow tells of every table it makes, and uses parts of SQLAlchemy that SQLAlchemy warns of."""
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


_TRACKERS: dict[Tracker, Callable[[Path, str, Mapping[str, Any], int], Sink]] = {
    "tensorboard": TensorBoardSink,
    "mlflow": MLflowSink,
    "wandb": WandbSink,
}
