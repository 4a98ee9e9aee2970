"""What may be set for adapting a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

from lexmill.config import refuse_idle

Method = Literal["full", "frozen", "bitfit", "lora", "adalora", "bottleneck", "prefix", "prompt"]

_LOW_RANK = ("method", ("lora", "adalora"))
_ADALORA = ("method", ("adalora",))
_IN_FRONT = ("method", ("prefix", "prompt"))
_NEEDS = {
    **dict.fromkeys(("rank", "alpha", "dropout", "targets"), _LOW_RANK),
    **dict.fromkeys(("initial_rank", "tinit", "tfinal", "delta_t", "orthogonality", "beta1", "beta2"), _ADALORA),
    "width": ("method", ("bottleneck",)),
    "tokens": _IN_FRONT,
    "double_quant": ("base_bits", (4, 8)),
    "keep_gigabytes": ("keep_activations", (None, True)),
    "keep_precision": ("keep_activations", (None, True)),
}


@dataclass(frozen=True)
class AdaptConfig:
    """Which weights are trained. Heads always are. `docs/adapting.md` says what each method is for.

    Args:
        method: `full` trains every weight; `frozen` the heads alone; `bitfit` the biases (Ben Zaken et al. 2022);
            `lora` low-rank matrices beside the `targets` (Hu et al. 2022), which are added to the model at the end;
            `adalora` the same, with ranks that move to the layers that need them (Zhang et al. 2023); `bottleneck` two
            small layers after attention and after the feed-forward layers (Houlsby et al. 2019); `prefix` keys and
            values in front of those of each layer (Li and Liang 2021); `prompt` embeddings in front of the input
            (Lester et al. 2021).
        layers: adapt only so many of the upper layers, or those of a list of numbers, counted from 0 at the bottom,
            a decoder's after its encoder's; the others, and the embeddings, stay as they are.
        rank, alpha: of `lora`: its matrices have this rank, and their product is scaled by `alpha / rank`. Of
            `adalora`: the mean rank at the end, and the scale is `alpha / initial_rank`.
        dropout: of `lora` and `adalora`, on the input of their matrices.
        targets: of `lora` and `adalora`: names of linear layers, out of `query`, `key`, `value`, `output`, `gate`, `up`
            and `down`.
        initial_rank: of `adalora`, of every matrix at the start; one and a half times `rank` where None.
        tinit, tfinal: of `adalora`: shares of the run at its start and at its end in which ranks stay.
        delta_t: of `adalora`: ranks move once in this share of the run, at each step where that is less than one.
        orthogonality: of `adalora`: the weight of the penalty that keeps its vectors orthonormal.
        beta1, beta2: of `adalora`: how slowly sensitivity, and its uncertainty, are smoothed.
        width: of `bottleneck`: what is between its two layers.
        tokens: of `prefix` and `prompt`: how many are put in front.
        base_bits: store the matrices that are not trained in so many bits a weight while training (Dettmers et al.
            2023), 4 in normal float or 8; the model is saved with the rounded matrices that it was trained with.
        double_quant: of `base_bits`: store their scales in 8 bits too.
        keep_activations: run the layers below the lowest trained one once over every example, without dropout, keep
            what they give in a file beside the run, and train on that. None does so where nothing below is trained,
            there is more than one epoch, and the file fits `keep_gigabytes`; true insists on it.
        keep_gigabytes: the largest such file.
        keep_precision: `fp32`, or `bf16`, of half the size, which rounds the kept states.
    """

    method: Method = "full"
    layers: Annotated[int, Ge(1)] | tuple[Annotated[int, Ge(0)], ...] | None = None
    rank: Annotated[int, Ge(1)] = 8
    alpha: Annotated[float, Gt(0)] = 16.0
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    targets: tuple[str, ...] = ("query", "value")
    initial_rank: Annotated[int, Ge(2)] | None = None
    tinit: Annotated[float, Ge(0), Lt(1)] = 0.1
    tfinal: Annotated[float, Ge(0), Lt(1)] = 0.3
    delta_t: Annotated[float, Gt(0), Lt(1)] = 0.01
    orthogonality: Annotated[float, Ge(0)] = 0.1
    beta1: Annotated[float, Gt(0), Lt(1)] = 0.85
    beta2: Annotated[float, Gt(0), Lt(1)] = 0.85
    width: Annotated[int, Ge(1)] = 64
    tokens: Annotated[int, Ge(1)] = 20
    base_bits: Literal[4, 8] | None = None
    double_quant: bool = True
    keep_activations: bool | None = None
    keep_gigabytes: Annotated[float, Gt(0)] = 4.0
    keep_precision: Literal["fp32", "bf16"] = "fp32"

    def check(self) -> None:
        """Raise `UserError` for a key that does nothing with this method."""
        refuse_idle(self, "adapt", _NEEDS)

    @property
    def start_rank(self) -> int:
        """The rank of each matrix of `adalora` at the start."""
        return self.initial_rank or -(-3 * self.rank // 2)
