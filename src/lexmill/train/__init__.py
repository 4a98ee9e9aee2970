"""Training: one pure step, one thin loop, exact resume."""

from lexmill.train.checkpoint import Checkpoint, Store
from lexmill.train.config import TrainConfig
from lexmill.train.kept import HeadStart, KeptActivations, keep_activations, kept_bytes
from lexmill.train.loop import Trainer, TrainResult
from lexmill.train.optimizer import Optimizer
from lexmill.train.step import Manner, StepResult, accumulate, train_step

__all__ = [
    "Checkpoint",
    "HeadStart",
    "KeptActivations",
    "Manner",
    "Optimizer",
    "StepResult",
    "Store",
    "TrainConfig",
    "TrainResult",
    "Trainer",
    "accumulate",
    "keep_activations",
    "kept_bytes",
    "train_step",
]
