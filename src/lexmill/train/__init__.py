"""Training: one pure step, one thin loop, exact resume."""

from lexmill.train.checkpoint import Checkpoint, Store
from lexmill.train.config import TrainConfig
from lexmill.train.loop import Trainer, TrainResult
from lexmill.train.optimizer import Optimizer
from lexmill.train.step import Manner, StepResult, accumulate, train_step

__all__ = [
    "Checkpoint",
    "Manner",
    "Optimizer",
    "StepResult",
    "Store",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "accumulate",
    "train_step",
]
