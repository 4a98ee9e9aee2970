"""What may be set for a training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, Lt

from lexmill.config import refuse_idle
from lexmill.errors import UserError
from lexmill.train.schedule import Schedule

_NEEDS = {
    "momentum": ("optimizer", ("sgd", "muon")),
    "beta1": ("optimizer", ("adamw", "muon")),
    "beta2": ("optimizer", ("adamw", "muon")),
    "epsilon": ("optimizer", ("adamw", "muon")),
    "decay": ("schedule", ("wsd",)),
    "adversarial_size": ("adversarial", ("fgm", "freelb")),
    "adversarial_steps": ("adversarial", ("freelb",)),
}


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
        layer_decay: the learning rate of each layer is that of the one above times this (Clark et al. 2020): heads
            learn at the full rate, the top layer at this share of it, embeddings the slowest.
        weight_decay: of matrices and embeddings; biases and norms are never decayed (Loshchilov and Hutter, 2019).
        optimizer: `adamw`; `sgd`; `adafactor`, which keeps a row and a column of second moments a matrix; or `muon` for
            the matrices of the trunk's layers, with AdamW for the rest.
        beta1, beta2, epsilon: of AdamW.
        momentum: of `sgd` and `muon`.
        max_grad_norm: gradients are scaled down to this global L2 norm; 0 turns clipping off.
        dropout: of hidden states and attention weights, in place of the model's own.
        r_drop: weight of the divergence between two passes under different dropout (Liang et al. 2021); 0 for none.
        adversarial: further passes on word vectors moved to where the loss is larger: `fgm` (Miyato et al. 2017), or
            `freelb` (Zhu et al. 2020), which takes `adversarial_steps` of them.
        adversarial_size: how far a sequence of vectors is moved, as a share of its length.
        ema: share of the old average that each update of the averaged weights keeps (Polyak and Juditsky, 1992). They
            are what is validated and kept. 0 for none.
        balanced: draw every class equally often; an epoch is as long as before.
        precision: `fp32`; `bf16` or `fp16` for the arithmetic with weights and optimiser state in fp32. `fp16` scales
            the loss, and skips steps that overflow.
        recompute: keep no activations inside layers, and compute them again in the backward pass: less memory, a third
            more work (Chen et al. 2016).
        device: `cpu`, `cuda`, `cuda:1`; `auto` is the first GPU where there is one.
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
    layer_decay: Annotated[float, Gt(0), Le(1)] = 1.0
    weight_decay: Annotated[float, Ge(0)] = 0.0
    optimizer: Literal["adamw", "sgd", "adafactor", "muon"] = "adamw"
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999
    epsilon: Annotated[float, Gt(0)] = 1e-8
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    max_grad_norm: Annotated[float, Ge(0)] = 1.0
    dropout: Annotated[float, Ge(0), Lt(1)] | None = None
    r_drop: Annotated[float, Ge(0)] = 0.0
    adversarial: Literal["none", "fgm", "freelb"] = "none"
    adversarial_size: Annotated[float, Gt(0)] = 0.05
    adversarial_steps: Annotated[int, Ge(2)] = 3
    ema: Annotated[float, Ge(0), Lt(1)] = 0.0
    balanced: bool = False
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    recompute: bool = False
    device: str = "auto"
    token_budget: Annotated[int, Ge(1)] = 4096
    length_window: Annotated[int, Ge(1)] = 1
    patience: Annotated[int, Ge(1)] | None = None
    checkpoint_every: Annotated[int, Ge(0)] = 0
    keep_checkpoints: Annotated[int, Ge(1), Le(1000)] = 2

    def check(self, *, validating: bool) -> None:
        """Raise `UserError` for a key that can do nothing: one of another optimiser, schedule or way to train, or early
        stopping where there is no validation data to go by."""
        refuse_idle(self, "train", _NEEDS)
        if self.patience is not None and not validating:
            raise UserError(
                "early stopping needs validation data",
                where="train.patience",
                hint="give --validation FILE or --set data.validation_fraction=0.1",
            )
