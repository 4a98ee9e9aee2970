"""Sparsity: single weights set to 0, anywhere or so many of every few. No shape changes, and so nothing gets faster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, cast

import torch
from annotated_types import Ge, Gt, Lt
from jaxtyping import Bool
from torch import Tensor

from lexmill.compress.base import Material, Method, Stage, register
from lexmill.compress.calibrate import groups_of, groups_without
from lexmill.compress.factorise import second_moments
from lexmill.compress.recover import Recovery, recover
from lexmill.compress.sparsify_weights import By, Pattern, sparse
from lexmill.compress.weights_rounding import lost
from lexmill.engine import Loaded
from lexmill.errors import Failure, UserError
from lexmill.nn.linear import Linear
from lexmill.train.companion import Companion

_SHARE = 0.5


@dataclass(frozen=True)
class SparsityOptions:
    """What may be set for `sparsity`.

    Args:
        share: of the weights of every matrix that become 0, wherever they lie; 0.5 where there is no `pattern`.
        pattern: `2:4` or the like: so many of every so many neighbours in a row of a matrix stay.
        by: how weights are chosen: `magnitude`, `wanda` or `sparsegpt`. The last changes the others, too, so that they
            make up for what is lost.
        rows: training rows that the inputs of layers are measured on.
        damp: `sparsegpt`: what is added to the diagonal of second moments, as a share of its mean.
        skip: places of layers, such as `layers.0.mlp`, that stay as they are.
        recover: whether the model is trained on afterwards, as `recovery` says; zeros stay 0.
    """

    share: Annotated[float, Gt(0), Lt(1)] | None = None
    pattern: str | None = None
    by: By = "sparsegpt"
    rows: Annotated[int, Ge(1)] = 128
    damp: Annotated[float, Gt(0)] = 0.01
    skip: tuple[str, ...] = ()
    recover: bool = True
    recovery: Recovery = field(default_factory=Recovery)

    def read_pattern(self) -> Pattern:
        """Where zeros are to lie. A `UserError` where it is said twice, or not understood."""
        if self.pattern is None:
            return Pattern(_SHARE if self.share is None else self.share)
        if self.share is not None:
            raise UserError("a pattern says what share stays", where="share", hint="leave one of the two out")
        return Pattern.read(self.pattern)


@register
class Sparsity(Method):
    """Unstructured and N:M sparsity by magnitude, Wanda (Sun et al. 2023) or SparseGPT (Frantar and Alistarh 2023)."""

    name: ClassVar[str] = "sparsity"
    stage: ClassVar[Stage] = "sparsify"
    Options: ClassVar[type] = SparsityOptions
    after: ClassVar[Mapping[Stage, str]] = {
        "exits": "since thresholds hold for the layers that they were chosen with",
        "sparsify": "since one pattern would break the other",
        "quantise": "since the matrices are not whole any more",
    }

    def check(self, subject: Loaded, options: SparsityOptions) -> None:
        pattern = options.read_pattern()
        for place, layer in _layers(subject, options).items():
            if pattern.of and layer.in_features % pattern.of:
                hint = "take another pattern, or skip it"
                what = f"'{place}' has {layer.in_features} columns: no groups of {pattern.of}"
                raise UserError(what, where="pattern", hint=hint)
            if not pattern.of and not 0 < round(pattern.share * layer.in_features) < layer.in_features:
                raise UserError(f"{pattern.share:g} of '{place}' is none of a row or all of it", where="share")

    def apply(self, subject: Loaded, material: Material, options: SparsityOptions) -> tuple[Loaded, dict[str, float]]:
        self.check(subject, options)
        rows = material.sample(options.rows)
        if not rows:
            raise UserError("there are no rows to measure on", where="train")
        layers, pattern = _layers(subject, options), options.read_pattern()
        groups = groups_without(subject.model.trunk, options.skip)
        moments = second_moments(subject, rows, [group.places[0] for group in groups], exact=False)
        errors: list[float] = []
        for number, group in enumerate(groups, start=1):
            seen = moments[group.places[0]]
            errors += [_sparsify(layers[place], seen, pattern, options) for place in group.places]
            material.progress(number / len(groups))
        kept = _Kept({place: (layer.weight, layer.weight.detach() != 0) for place, layer in layers.items()})
        effect = recover(subject, material, options.recovery, companion=kept) if options.recover else {}
        shares = [kept.share(place) for place in layers]
        material.note(f"{min(shares):.1%} to {max(shares):.1%} of the weights of a layer are 0")
        material.note("the model is as large and as slow as before: products on this target multiply zeros, too")
        found = {
            "layers_sparse": len(layers),
            "layers_dense": sum(len(group.places) for group in groups_of(subject.model.trunk)) - len(layers),
            "weights": sum(layer.weight.numel() for layer in layers.values()),
            "zeros": sum(int((layer.weight == 0).sum()) for layer in layers.values()),
            "share_zero_least": min(shares),
            "share_zero_largest": max(shares),
            "layer_error": sum(errors) / len(errors),
            "layer_error_largest": max(errors),
        }
        return subject, {name: float(value) for name, value in found.items()} | effect


def _layers(subject: Loaded, options: SparsityOptions) -> dict[str, Linear]:
    trunk = subject.model.trunk
    places = [place for group in groups_without(trunk, options.skip) for place in group.places]
    return {place: cast("Linear", trunk.get_submodule(place)) for place in places}


@torch.no_grad()
def _sparsify(layer: Linear, moments: Tensor, pattern: Pattern, options: SparsityOptions) -> float:
    """Set weights to 0, in place. What outputs are off by: the root mean square, as a share of their own."""
    before = layer.weight.float()
    after = sparse(before, moments, pattern, options.by, damp=options.damp)
    layer.weight.copy_(after)
    whole = lost(before, torch.zeros_like(before), moments)
    return (lost(before, after, moments) / max(whole, 1e-30)) ** 0.5


class _Kept(Companion):
    """Keeps what is 0 at 0 while the rest is trained."""

    def __init__(self, layers: Mapping[str, tuple[Tensor, Bool[Tensor, "out in"]]]) -> None:
        self._layers = layers

    def before_update(self, step: int, steps: int, scale: float) -> None:
        for weight, kept in self._layers.values():
            if weight.grad is not None:
                weight.grad *= kept

    def after_update(self, step: int, steps: int) -> Mapping[str, float]:
        return {}

    def settled(self, step: int, steps: int) -> bool:
        return True

    def state(self) -> Mapping[str, Tensor]:
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        return

    def share(self, place: str) -> float:
        """What share of a layer's weights is 0. A `Failure` where one that was 0 is not any more."""
        weight, kept = self._layers[place]
        if bool((weight.detach()[~kept] != 0).any()):
            raise Failure(f"training filled zeros of '{place}'", hint="report it: the pattern is lost")
        return 1 - float(kept.sum()) / kept.numel()
