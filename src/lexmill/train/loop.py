"""The loop: batches in order, one step each, events, validation, checkpoints. All that varies is decided before it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from lexmill.data.batch import Batch
from lexmill.data.draws import keys
from lexmill.data.order import BalancedOrder, Order
from lexmill.data.packing import micro_batches
from lexmill.errors import Failure, UserError
from lexmill.hardware import matmul_rate, peak_memory
from lexmill.models import Model
from lexmill.nn.linear import pack
from lexmill.tasks.base import Task
from lexmill.train.adversarial import FGM, FreeLB
from lexmill.train.average import Average
from lexmill.train.checkpoint import Store
from lexmill.train.companion import Companion
from lexmill.train.config import TrainConfig
from lexmill.train.interrupt import interruptible
from lexmill.train.kept import Dataset, HeadStart
from lexmill.train.optimizer import Optimizer
from lexmill.train.passes import Losses, Passes, RDrop, once, plain
from lexmill.train.scaling import LossScale
from lexmill.train.schedule import learning_rate
from lexmill.train.step import ARITHMETIC, MOST_PACKED, Manner, StepResult, step_seed, train_step


@dataclass
class Progress:
    """Where a run stands: all of its state that is not a tensor. `loss` is the last step's; seconds, examples, tokens,
    positions and what `acted` are sums over the run, each step counted once however often it was interrupted."""

    step: int = 0
    loss: float = math.nan
    seconds: float = 0.0
    examples: int = 0
    tokens: int = 0
    positions: float = 0
    best: float | None = None
    best_epoch: int | None = None
    stale_epochs: int = 0
    stopped: bool = False
    validations: list[dict[str, float]] = field(default_factory=list)
    acted: dict[str, float] = field(default_factory=dict)
    scaling: LossScale = field(default_factory=LossScale)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Progress:
        """The inverse of `asdict`."""
        found = cls(**{name: value for name, value in state.items() if name != "scaling"})
        found.scaling = LossScale(**state["scaling"])
        return found


@dataclass(frozen=True)
class TrainResult:
    """What a run did, for the artefact's history.

    Args:
        acted: what options that are not always on did: means over the steps, or totals.
    """

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
    acted: Mapping[str, float]

    def effect(self) -> dict[str, float]:
        """All of it as numbers by name."""
        own = {name: value for name, value in asdict(self).items() if name != "acted" and value is not None}
        return {name: float(value) for name, value in own.items()} | dict(self.acted)


class Trainer:
    """One run of one model on one data set.

    Args:
        validate: the task's metrics on validation data, by name; called after each epoch.
        store: where checkpoints go; none are written without it.
        start: what was computed before the first step; it counts in the run's seconds and positions.
        companion: takes part in each step.
        losses: what an item's loss is made of; as the config has it where None.
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
        start: HeadStart | None = None,
        companion: Companion | None = None,
        losses: Losses | None = None,
    ) -> None:
        config.check(validating=validate is not None)
        if config.recompute and not model.trunk.recomputes:
            raise UserError("this model keeps its activations", where="train.recompute", hint="leave it out")
        if config.recompute and not any(p.requires_grad for p in model.trunk.parameters()):
            what = "no layer is trained, so that none keeps activations"
            raise UserError(what, where="train.recompute", hint="leave it out")
        if config.adversarial != "none" and not model.trunk.moves_words:
            what = "the word vectors of this model cannot be moved"
            raise UserError(what, where="train.adversarial", hint="leave it out")
        if config.ema and companion is not None:
            hint = "leave it out, or adapt with another method"
            raise UserError("an average of weights would bring back what was taken out", where="train.ema", hint=hint)
        if task.couples and (config.adversarial != "none" or config.r_drop):
            key = "train.r_drop" if config.r_drop else "train.adversarial"
            what = f"'{task.name}' compares the examples of a batch, which goes through once"
            raise UserError(what, where=key, hint="leave it out")
        if config.r_drop and not model.drops():
            what = "without dropout two passes of a text are equal"
            raise UserError(what, where="train.r_drop", hint="give train.dropout, or leave it out")
        self.model, self.task, self.data, self.config = model, task, data, config
        self.validate, self.store, self.start, self.companion = validate, store, start or HeadStart(), companion
        self.order = _order(data, config)
        self.total_steps = config.epochs * self.order.steps_per_epoch
        self.optimizer = Optimizer(model, config)
        self._pack_frozen()
        self.average = Average(model, config.ema) if config.ema else None
        self.manner = Manner(config.precision, _passes(config), losses or _losses(config))
        self.progress = Progress(seconds=self.start.seconds, positions=self.start.positions)
        self._best: dict[str, torch.Tensor] = {}
        model.trunk.recompute = config.recompute

    # --- resuming ---------------------------------------------------------------------------------------------
    def resume(self) -> bool:
        """Go on from the newest checkpoint. False where there is none."""
        saved = self.store.latest() if self.store else None
        if saved is None:
            return False
        self.model.load_state_dict(saved.group("model"), strict=True)
        self.optimizer.load(saved.group("optimizer"))
        if self.average is not None:
            self.average.load(saved.group("average"))
        self._best = saved.group("best")
        if self.companion is not None:
            self.companion.load(saved.group("companion"))
        self.progress = Progress.of(saved.state)
        self._pack_frozen()
        return True

    def _pack_frozen(self) -> None:
        """Lay out the weights that stay as they are for products, where that takes little memory."""
        tokens = min(float(self.data.lengths.mean()) * self.config.batch_size, self.config.token_budget)
        dtype = ARITHMETIC[self.config.precision]
        pack(self.model, round(tokens), dtype=dtype, training=True, most=MOST_PACKED)

    def _save(self) -> None:
        if self.store is None:
            return
        self.optimizer.settle()
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        tensors |= {f"optimizer.{name}": t for name, t in self.optimizer.state().items()}
        if self.average is not None:
            tensors |= {f"average.{name}": t for name, t in self.average.state().items()}
        tensors |= {f"best.{name}": t for name, t in self._best.items()}
        if self.companion is not None:
            tensors |= {f"companion.{name}": t for name, t in self.companion.state().items()}
        self.store.save(self.progress.step, tensors, asdict(self.progress))

    # --- running ----------------------------------------------------------------------------------------------
    def run(self, emit: Callable[[Mapping[str, Any]], None]) -> TrainResult:
        """Train to the end, or until early stopping. The model then holds the best weights seen where there is
        validation data, else the last; it is left in evaluation mode.

        Args:
            emit: takes every event: `phase` (`train`, `validate`), `step`, `loss`, …
        """
        meter = _Meter(self.model, self.data, self.config, self.progress, self.start.layers)
        self.model.train()
        with interruptible() as raise_if_interrupted:
            while self.progress.step < self.total_steps and not self.progress.stopped:
                result = self.step()
                done = self.companion.after_update(self.progress.step, self.total_steps) if self.companion else {}
                emit({**self._event(result, meter.update(result)), **done})
                self.progress.step += 1
                self._between_steps(emit)
                raise_if_interrupted()
        self.optimizer.close()
        acted = self._acted()
        if self._best:
            self.model.load_state_dict(self._best, strict=True)
        self.model.trunk.recompute = False
        self.model.eval()
        return meter.result(self.order.steps_per_epoch, acted)

    def _acted(self) -> dict[str, float]:
        """What the run's options did. Leaves the model with the averaged weights, where they are kept."""
        progress = self.progress
        updates = max(progress.step - progress.scaling.skipped, 1)
        acted = {name: total / updates for name, total in progress.acted.items()}
        acted |= self.optimizer.effect()
        if self.config.precision == "fp16":
            acted |= {"loss_scale": progress.scaling.value, "overflowed_steps": float(progress.scaling.skipped)}
        if self.average is not None:
            acted["ema_distance"] = self.average.put()
        if self.config.recompute:
            acted["recomputed_layers"] = float(len(self.model.trunk.blocks) - self.model.untrained_layers())
        shares = self.optimizer.shares
        if len(shares) > 1:
            rate = self.config.learning_rate
            acted |= {"lowest_rate": shares[0] * rate, "highest_rate": shares[-1] * rate}
        if isinstance(self.order, BalancedOrder):
            acted["balanced_classes"] = float(self.order.num_classes)
        return acted

    def step(self) -> StepResult:
        """One optimiser step at the run's position, which stays. Raises `Failure` where the loss is not finite."""
        step, scaling = self.progress.step, self.progress.scaling
        fp16 = self.config.precision == "fp16"
        result = train_step(
            self.model,
            self.task,
            self._batches(step),
            self.optimizer,
            learning_rate=self._learning_rate(step),
            seed=step_seed(self.config.seed, step),
            manner=replace(self.manner, scale=scaling.value) if fp16 else self.manner,
            before_update=self._before_update,
        )
        overflowed = fp16 and math.isfinite(result.loss) and not math.isfinite(result.grad_norm)
        if fp16:
            scaling.after(overflowed=overflowed)
        if not (math.isfinite(result.loss) and (overflowed or math.isfinite(result.grad_norm))):
            raise Failure(
                f"step {step}: loss {result.loss}, gradient norm {result.grad_norm}",
                hint="lower train.learning_rate, or add train.warmup; checkpoints from before are whole",
            )
        if self.average is not None:
            self.optimizer.settle()
            self.average.update()
        if overflowed:
            return replace(result, acted={})
        clipped = 0 < self.config.max_grad_norm < result.grad_norm
        for name, value in (*result.acted.items(), ("clipped_share", float(clipped))):
            self.progress.acted[name] = self.progress.acted.get(name, 0.0) + value
        return result

    def _before_update(self, scale: float) -> None:
        if self.companion is not None:
            self.companion.before_update(self.progress.step, self.total_steps, scale)

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
        epoch = step // self.order.steps_per_epoch
        return [self.task.draw(self.data.batch(part), keys(part, self.config.seed, epoch)) for part in cut]

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
        with self.average.applied() if self.average is not None else nullcontext():
            metrics = dict(self.validate())
            value = metrics[self.task.metric] * self.task.metric_sign
            if self.companion is not None and not self.companion.settled(self.progress.step - 1, self.total_steps):
                pass  # a model of another form than it is to end in is no candidate for the best
            elif self.progress.best is None or value > self.progress.best:
                self.progress.best, self.progress.best_epoch, self.progress.stale_epochs = value, epoch, 0
                self._best = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
            else:
                self.progress.stale_epochs += 1
        self.model.train()
        self.progress.validations.append(metrics)
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
            **result.acted,
            "grad_norm": result.grad_norm,
            "learning_rate": self._learning_rate(step),
            **self._rates(step),
            **speed,
        }

    def _rates(self, step: int) -> dict[str, float]:
        shares, rate = self.optimizer.shares, self._learning_rate(step)
        return {"learning_rate/lowest": shares[0] * rate} if len(shares) > 1 else {}


def _order(data: Dataset, config: TrainConfig) -> Order | BalancedOrder:
    if not config.balanced:
        return Order(len(data), config.batch_size, config.seed, lengths=data.lengths, window=config.length_window)
    if config.length_window > 1:
        hint = "set one of the two"
        raise UserError("batches by length cannot be balanced", where="train.balanced", hint=hint)
    return BalancedOrder(data.classes(), config.batch_size, config.seed)


def _passes(config: TrainConfig) -> Passes:
    match config.adversarial:
        case "none":
            return once
        case "fgm":
            return FGM(config.adversarial_size)
        case "freelb":
            return FreeLB(config.adversarial_size, config.adversarial_steps)


def _losses(config: TrainConfig) -> Losses:
    return RDrop(config.r_drop) if config.r_drop else plain


class _Meter:
    """What the steps did and how fast, summed up in the run's progress."""

    def __init__(self, model: Model, data: Dataset, config: TrainConfig, progress: Progress, known_layers: int) -> None:
        self.progress = progress
        self.work = model.training_work(known_layers)
        mean_tokens = max(1, round(float(data.lengths.mean()) * min(config.batch_size, len(data))))
        dtype = ARITHMETIC[config.precision]
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

    def result(self, steps_per_epoch: int, acted: Mapping[str, float]) -> TrainResult:
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
            acted=acted,
        )
