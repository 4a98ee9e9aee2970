"""The loop: batches in order, one step each, events, validation, checkpoints. All that varies is decided before it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from lexmill.data.batch import Batch
from lexmill.data.order import Order
from lexmill.data.packing import micro_batches
from lexmill.errors import Failure
from lexmill.hardware import matmul_rate, peak_memory
from lexmill.models import Model
from lexmill.tasks.base import Task
from lexmill.train.checkpoint import Store
from lexmill.train.config import TrainConfig
from lexmill.train.optimizer import Optimizer
from lexmill.train.schedule import learning_rate
from lexmill.train.step import StepResult, step_seed, train_step


class Dataset(Protocol):
    """Tokenized examples by index; `lengths` are tokens per example."""

    @property
    def lengths(self) -> np.ndarray: ...
    def __len__(self) -> int: ...
    def batch(self, indices: np.ndarray) -> Batch: ...


@dataclass
class Progress:
    """Where a run stands: all of its state that is not a tensor. `loss` is the last step's; seconds, examples, tokens
    and positions are sums over the run, each step counted once however often it was interrupted."""

    step: int = 0
    loss: float = math.nan
    seconds: float = 0.0
    examples: int = 0
    tokens: int = 0
    positions: int = 0
    best: float | None = None
    best_epoch: int | None = None
    stale_epochs: int = 0
    stopped: bool = False
    validations: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class TrainResult:
    """What a run did, for the artefact's history."""

    steps: int
    epochs: float
    final_loss: float
    best_epoch: int | None
    stopped_early: bool
    seconds: float
    examples_per_second: float
    ceiling_share: float
    positions_per_token: float
    peak_memory: int


class Trainer:
    """One run of one model on one data set.

    Args:
        validate: the task's metrics on validation data, by name; called after each epoch.
        store: where checkpoints go; none are written without it.
    """

    def __init__(
        self,
        model: Model,
        task: Task,
        data: Dataset,
        config: TrainConfig,
        *,
        validate: Callable[[], Mapping[str, float]] | None = None,
        store: Store | None = None,
    ) -> None:
        config.check_stopping(validating=validate is not None)
        self.model, self.task, self.data, self.config = model, task, data, config
        self.validate, self.store = validate, store
        self.order = Order(len(data), config.batch_size, config.seed, lengths=data.lengths, window=config.length_window)
        self.total_steps = config.epochs * self.order.steps_per_epoch
        self.optimizer = Optimizer(model, config)
        self.progress = Progress()
        self._best: dict[str, torch.Tensor] = {}

    # --- resuming ---------------------------------------------------------------------------------------------
    def resume(self) -> bool:
        """Go on from the newest checkpoint. False where there is none."""
        saved = self.store.latest() if self.store else None
        if saved is None:
            return False
        self.model.load_state_dict(saved.group("model"), strict=True)
        self.optimizer.load(saved.group("optimizer"))
        self._best = saved.group("best")
        self.progress = Progress(**saved.state)
        return True

    def _save(self) -> None:
        if self.store is None:
            return
        self.optimizer.settle()
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        tensors |= {f"optimizer.{name}": t for name, t in self.optimizer.state().items()}
        tensors |= {f"best.{name}": t for name, t in self._best.items()}
        self.store.save(self.progress.step, tensors, asdict(self.progress))

    # --- running ----------------------------------------------------------------------------------------------
    def run(self, emit: Callable[[Mapping[str, Any]], None]) -> TrainResult:
        """Train to the end, or until early stopping. The model then holds the best weights seen where there is
        validation data, else the last; it is left in evaluation mode.

        Args:
            emit: takes every event: `phase` (`train`, `validate`), `step`, `loss`, …
        """
        meter = _Meter(self.model, self.data, self.config, self.progress)
        self.model.train()
        while self.progress.step < self.total_steps and not self.progress.stopped:
            result = self.step()
            emit(self._event(result, meter.update(result)))
            self.progress.step += 1
            self._between_steps(emit)
        self.optimizer.close()
        if self._best:
            self.model.load_state_dict(self._best, strict=True)
        self.model.eval()
        return meter.result(self.order.steps_per_epoch)

    def step(self) -> StepResult:
        """One optimiser step at the run's position, which stays. Raises `Failure` where the loss is not finite."""
        step = self.progress.step
        result = train_step(
            self.model,
            self.task,
            self._batches(step),
            self.optimizer,
            learning_rate=self._learning_rate(step),
            seed=step_seed(self.config.seed, step),
            precision=self.config.precision,
        )
        if not math.isfinite(result.loss) or not math.isfinite(result.grad_norm):
            raise Failure(
                f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}",
                hint="lower train.learning_rate, or add train.warmup; checkpoints from before are whole",
            )
        return result

    def _learning_rate(self, step: int) -> float:
        config = self.config
        return learning_rate(
            step,
            self.total_steps,
            peak=config.learning_rate,
            schedule=config.schedule,
            warmup=config.warmup,
            decay=config.decay,
        )

    def _batches(self, step: int) -> list[Batch]:
        cut = micro_batches(self.order.batch(step), self.data.lengths, self.config.token_budget)
        return [self.data.batch(indices) for indices in cut]

    def _between_steps(self, emit: Callable[[Mapping[str, Any]], None]) -> None:
        step, epoch_end = self.progress.step, self.progress.step % self.order.steps_per_epoch == 0
        if epoch_end and self.validate is not None:
            emit(self._validate(step // self.order.steps_per_epoch))
        every = self.config.checkpoint_every
        if step % every == 0 if every else epoch_end:
            self._save()

    def _validate(self, epoch: int) -> dict[str, Any]:
        assert self.validate is not None
        self.optimizer.settle()
        self.model.eval()
        metrics = dict(self.validate())
        self.model.train()
        value = metrics[self.task.metric] * self.task.metric_sign
        self.progress.validations.append(metrics)
        if self.progress.best is None or value > self.progress.best:
            self.progress.best, self.progress.best_epoch, self.progress.stale_epochs = value, epoch, 0
            self._best = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
        else:
            self.progress.stale_epochs += 1
        patience = self.config.patience
        self.progress.stopped = patience is not None and self.progress.stale_epochs >= patience
        return {"phase": "validate", "step": self.progress.step, "epoch": epoch, **metrics}

    def _event(self, result: StepResult, speed: Mapping[str, float]) -> dict[str, Any]:
        step = self.progress.step
        heads = {f"loss/{head}": loss for head, loss in result.losses.items()} if len(result.losses) > 1 else {}
        return {
            "phase": "train",
            "step": step,
            "steps": self.total_steps,
            "epoch": step / self.order.steps_per_epoch,
            "loss": result.loss,
            **heads,
            "grad_norm": result.grad_norm,
            "learning_rate": self._learning_rate(step),
            **speed,
        }


class _Meter:
    """What the steps did and how fast, summed up in the run's progress."""

    def __init__(self, model: Model, data: Dataset, config: TrainConfig, progress: Progress) -> None:
        self.progress = progress
        self.work = model.training_work()
        mean_tokens = max(1, round(float(data.lengths.mean()) * min(config.batch_size, len(data))))
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        rows = min(mean_tokens, config.token_budget)
        self.ceiling = matmul_rate(model.matmul_shapes(), rows, dtype=dtype, device=model.device)
        self.last = time.perf_counter()

    def update(self, result: StepResult) -> dict[str, float]:
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        self.progress.loss = result.loss
        self.progress.seconds += seconds
        self.progress.examples += result.examples
        self.progress.tokens += result.tokens
        self.progress.positions += result.positions
        return {
            "seconds": seconds,
            "examples_per_second": result.examples / seconds,
            "tokens_per_second": result.tokens / seconds,
            "ceiling_share": self._share(result.tokens / seconds),
            "positions_per_token": result.positions / max(result.tokens, 1),
            "peak_memory": peak_memory(),
        }

    def _share(self, tokens_per_second: float) -> float:
        return self.work * tokens_per_second / self.ceiling

    def result(self, steps_per_epoch: int) -> TrainResult:
        progress = self.progress
        return TrainResult(
            steps=progress.step,
            epochs=progress.step / steps_per_epoch,
            final_loss=progress.loss,
            best_epoch=progress.best_epoch,
            stopped_early=progress.stopped,
            seconds=progress.seconds,
            examples_per_second=progress.examples / progress.seconds,
            ceiling_share=self._share(progress.tokens / progress.seconds),
            positions_per_token=progress.positions / max(progress.tokens, 1),
            peak_memory=peak_memory(),
        )
