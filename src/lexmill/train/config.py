"""What may be set for a training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from lexmill.errors import UserError
from lexmill.train.schedule import Schedule


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained. The defaults fine-tune an encoder of 20 to 100 M parameters.

    Args:
        epochs: passes over the training data.
        seed: fixes new weights, data order and dropout.
        batch_size: examples per optimiser step, whatever their length.
        learning_rate: the peak of the schedule.
        schedule: the learning rate after warm-up: `linear` or `cosine` to 0, `exponential` to a hundredth of the peak,
            `constant`, or `wsd`: constant, then linear to 0 in the last share `decay`.
        warmup: share of the steps in which the learning rate rises from 0 to its peak.
        weight_decay: of matrices and embeddings; biases and norms are never decayed (Loshchilov and Hutter, 2019).
        beta1, beta2, epsilon: of AdamW.
        max_grad_norm: gradients are scaled down to this global L2 norm; 0 turns clipping off.
        dropout: of hidden states and attention weights, in place of the model's own.
        precision: `fp32`, or `bf16` for the arithmetic with weights and optimiser state in fp32.
        token_budget: tokens computed at once; a larger batch is cut into micro-batches, which changes speed and
            memory, never the result.
        length_window: batches are cut from this many batches' worth of examples sorted by length; 1 is a fully random
            order. A window of 50 is some 5 % faster, and cost half a point of accuracy on BANKING77.
        patience: stop after this many epochs without a better validation metric; needs validation data.
        checkpoint_every: steps between checkpoints; 0 for one an epoch.
        keep_checkpoints: how many of the latest checkpoints stay on disk.
    """

    epochs: Annotated[int, Ge(1)] = 4
    seed: Annotated[int, Ge(0), Lt(2**32)] = 0
    batch_size: Annotated[int, Ge(1)] = 32
    learning_rate: Annotated[float, Gt(0)] = 3e-4
    schedule: Schedule = "linear"
    warmup: Annotated[float, Ge(0), Lt(1)] = 0.0
    decay: Annotated[float, Gt(0), Le(1)] = 0.2
    weight_decay: Annotated[float, Ge(0)] = 0.0
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999
    epsilon: Annotated[float, Gt(0)] = 1e-8
    max_grad_norm: Annotated[float, Ge(0)] = 1.0
    dropout: Annotated[float, Ge(0), Lt(1)] | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    token_budget: Annotated[int, Ge(1)] = 4096
    length_window: Annotated[int, Ge(1)] = 1
    patience: Annotated[int, Ge(1)] | None = None
    checkpoint_every: Annotated[int, Ge(0)] = 0
    keep_checkpoints: Annotated[int, Ge(1), Le(1000)] = 2

    def check_stopping(self, *, validating: bool) -> None:
        """Raise `UserError` where early stopping is asked for and there is no validation data to go by."""
        if self.patience is not None and not validating:
            raise UserError(
                "early stopping needs validation data",
                where="train.patience",
                hint="give --validation FILE or --set data.validation_fraction=0.1",
            )
