"""Factorising: matrices as products of thin ones, exact where the inputs of a layer really lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, cast

import torch
from annotated_types import Ge, Gt, Lt
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lexmill.compress.base import Material, Method, Stage, batches, register
from lexmill.compress.recover import Recovery, recover
from lexmill.engine import Loaded
from lexmill.errors import UserError
from lexmill.models import Model, module_names
from lexmill.nn.linear import Linear, has_bias
from lexmill.nn.low_rank import LowRankLinear
from lexmill.tasks import Record

_RIDGE = 1e-6
"""Added to second moments, as a share of their mean, so that directions no row went into count a little."""


@dataclass(frozen=True)
class FactoriseOptions:
    """What may be set for `factorise`.

    Args:
        keep: the share of the weights of all matrices that can be factorised that is kept.
        rows: training rows that the inputs of layers are measured on.
        recover: whether the model is trained on afterwards, as `recovery` says.
    """

    keep: Annotated[float, Gt(0), Lt(1)] = 0.6
    rows: Annotated[int, Ge(1)] = 512
    recover: bool = True
    recovery: Recovery = field(default_factory=Recovery)


@register
class Factorise(Method):
    """Activation-aware low rank (Yuan et al. 2023, ASVD; Wang et al. 2024, SVD-LLM)."""

    name: ClassVar[str] = "factorise"
    stage: ClassVar[Stage] = "factorise"
    Options: ClassVar[type] = FactoriseOptions
    after: ClassVar[Mapping[Stage, str]] = {
        "factorise": "since the matrices are products already",
        "exits": "since thresholds hold for the layers that they were chosen with",
        "sparsify": "since the product of two matrices fills what was set to 0",
        "quantise": "since it needs the matrices whole",
    }

    def check(self, subject: Loaded, options: FactoriseOptions) -> None:
        if not places(subject.model):
            hint = "distil or quantise it"
            raise UserError(f"'{subject.model.family}' has no matrices that can stand as two", hint=hint)

    def apply(self, subject: Loaded, material: Material, options: FactoriseOptions) -> tuple[Loaded, dict[str, float]]:
        self.check(subject, options)
        trunk = subject.model.trunk
        layers = {place: cast("Linear", trunk.get_submodule(place)) for place in places(subject.model)}
        moments = second_moments(subject, material.sample(options.rows))
        factors = {place: Factors(layer.weight, moments[place]) for place, layer in layers.items()}
        before = sum(one.dense_cost for one in factors.values())
        ranks = choose_ranks(factors, round(options.keep * before))
        chosen = {place: rank for place, rank in ranks.items() if rank is not None}
        for place, rank in chosen.items():
            _put(trunk, place, factors[place].layer(rank, layers[place]))
            material.note(f"{place}: rank {rank} keeps {factors[place].kept(rank):.1%} of what it gives")
        after = sum(one.dense_cost if ranks[p] is None else one.cost * (ranks[p] or 0) for p, one in factors.items())
        found = {
            "layers_factorised": len(chosen),
            "layers_dense": len(ranks) - len(chosen),
            "weights_before": before,
            "weights_after": after,
            "rank_mean": sum(chosen.values()) / len(chosen),
            "energy_kept": sum(factors[place].kept(rank) for place, rank in chosen.items()) / len(chosen),
        }
        effect = recover(subject, material, options.recovery) if options.recover else {}
        return subject, {name: float(value) for name, value in found.items()} | effect


def places(model: Model) -> list[str]:
    """The dense layers of the trunk that have a matrix of their own in files, so that two can stand for it."""
    layers = {place: model.trunk.get_submodule(place) for place in module_names(model)}
    return [place for place, layer in layers.items() if type(layer) is Linear and layer.quantised is None]


def second_moments(
    subject: Loaded, rows: Sequence[Record], at: Sequence[str] | None = None, *, exact: bool = True
) -> dict[str, Float[Tensor, "in in"]]:
    """By place the mean of `x xᵀ` over the tokens that went into that layer, float64.

    Args:
        at: the places; all that can be factorised where None.
        exact: whether products are float64 too.
    """
    trunk = subject.model.trunk
    found: dict[str, Tensor] = {}
    seen: dict[str, int] = {}

    def hear(place: str) -> RemovableHandle:
        def before(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            x = given[0].detach().reshape(-1, given[0].shape[-1])
            x = x.double() if exact else x.float()
            product = (x.t() @ x).double()
            found[place] = found[place].add_(product) if place in found else product
            seen[place] = seen.get(place, 0) + len(x)

        return trunk.get_submodule(place).register_forward_pre_hook(before)

    hooks = [hear(place) for place in (places(subject.model) if at is None else at)]
    subject.model.eval()
    try:
        with torch.inference_mode():
            for batch in batches(subject, rows, labelled=True):
                subject.task.forward(subject.model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {place: total / seen[place] for place, total in found.items()}


class Factors:
    """The best products of each rank that stand for a matrix `W`, given the second moments `S = L Lᵀ` of its inputs.

    Since `E‖(W − W') x‖² = ‖(W − W') L‖²`, they are those of the singular value decomposition of `W L`.
    """

    def __init__(self, weight: Float[Tensor, "out in"], moments: Float[Tensor, "in in"]) -> None:
        size = len(moments)
        ridge = _RIDGE * moments.diagonal().mean().clamp_min(1e-12)
        self._whitening = torch.linalg.cholesky(moments + ridge * torch.eye(size, dtype=torch.float64))
        self._left, self.values, self._right = torch.linalg.svd(
            weight.detach().double().cpu() @ self._whitening, full_matrices=False
        )
        self.cost, self.dense_cost = sum(weight.shape), weight.numel()
        energy = self.values.square()
        self.shares: Float[Tensor, "rank"] = energy / energy.sum()

    def kept(self, rank: int) -> float:
        """The share of the mean square of the layer's outputs that a product of this rank keeps."""
        return float(self.shares[:rank].sum())

    def matrices(self, rank: int) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
        """The two, float64, as large as each other."""
        root = self.values[:rank].sqrt()
        right = torch.linalg.solve_triangular(self._whitening, self._right[:rank], upper=False, left=False)
        return self._left[:, :rank] * root, root[:, None] * right

    def layer(self, rank: int, dense: Linear) -> LowRankLinear:
        """A layer of this rank in place of the dense one, with its bias, device and precision."""
        layer = LowRankLinear(dense.in_features, dense.out_features, rank, bias=has_bias(dense)).to(dense.weight)
        with torch.no_grad():
            for half, made in zip((layer.up, layer.down), self.matrices(rank), strict=True):
                half.weight.copy_(made)
            if has_bias(dense):
                layer.up.bias.copy_(dense.bias)
        return layer.train(dense.training)


def choose_ranks(factors: Mapping[str, Factors], budget: int) -> dict[str, int | None]:
    """The rank of each matrix, None where it stays dense, for at most `budget` weights in all.

    Step by step the singular value that adds most of its layer's output for its weights. A matrix that would not
    shrink stays whole, and what that saves goes to the others. A `UserError` where not even rank 1 fits.
    """
    if sum(one.cost for one in factors.values()) > budget:
        raise UserError("rank 1 of every matrix takes more weights", where="keep", hint="give a larger share")
    dense: set[str] = set()
    while True:
        left = budget - sum(factors[place].dense_cost for place in dense)
        ranks = {place: 1 for place in factors if place not in dense}
        left -= sum(factors[place].cost for place in ranks)
        gains: list[tuple[float, str]] = []
        for place in ranks:
            gains += ((float(share) / factors[place].cost, place) for share in factors[place].shares[1:])
        for _, place in sorted(gains, reverse=True):
            if factors[place].cost <= left:
                ranks[place] += 1
                left -= factors[place].cost
        whole = {place for place, rank in ranks.items() if rank * factors[place].cost >= factors[place].dense_cost}
        if not whole:
            return {place: ranks.get(place) for place in factors}
        dense |= whole


def _put(trunk: nn.Module, place: str, layer: LowRankLinear) -> None:
    parent, _, name = place.rpartition(".")
    setattr(trunk.get_submodule(parent), name, layer)
