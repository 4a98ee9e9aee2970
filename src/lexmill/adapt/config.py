"""What may be set for adapting a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt


@dataclass(frozen=True)
class AdaptConfig:
    """Which weights are trained. Heads always are.

    Args:
        method: `full` trains every weight; `frozen` the heads alone; `bitfit` the biases (Ben Zaken et al. 2022);
            `lora` low-rank matrices beside the `targets` (Hu et al. 2022), which are added to the model at the end.
        layers: adapt only this many of the upper layers; the others, and the embeddings, stay as they are.
        rank, alpha: of `lora`: its matrices have this rank, and their product is scaled by `alpha / rank`.
        dropout: of `lora`, on the input of its matrices.
        targets: of `lora`: names of linear layers, out of `query`, `key`, `value`, `output`, `gate`, `up` and `down`.
        keep_activations: run the layers below the lowest trained one once over every example, without dropout, keep
            what they give in a file beside the run, and train on that. None does so where nothing below is trained,
            there is more than one epoch, and the file fits `keep_gigabytes`; true insists on it.
        keep_gigabytes: the largest such file.
        keep_precision: `fp32`, or `bf16`, of half the size, which rounds the kept states.
    """

    method: Literal["full", "frozen", "bitfit", "lora"] = "full"
    layers: Annotated[int, Ge(1)] | None = None
    rank: Annotated[int, Ge(1)] = 8
    alpha: Annotated[float, Gt(0)] = 16.0
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    targets: tuple[str, ...] = ("query", "value")
    keep_activations: bool | None = None
    keep_gigabytes: Annotated[float, Gt(0)] = 4.0
    keep_precision: Literal["fp32", "bf16"] = "fp32"
