"""Structured pruning: the neurons, heads, layers and units of hidden states that matter least are taken out, and the
matrices get smaller."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Lt
from jaxtyping import Float, Int
from torch import Tensor

from lexmill.compress.base import Material, Method, Stage, register
from lexmill.compress.calibrate import is_dense
from lexmill.compress.narrow import keep_layers, overrides_of, plain_transformer, slim, slimmed
from lexmill.compress.prune_importance import Kind, Order, Scope, blocks_of, choose, counts_of, importance, sizes_of
from lexmill.compress.recover import Recovery, recover
from lexmill.compress.units import num_weights, rows_of, shrink
from lexmill.engine import Loaded
from lexmill.errors import UserError
from lexmill.models import Transformer
from lexmill.models.config import LayerOverride

_MATRICES = (
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.output",
    "mlp.up",
    "mlp.gate",
    "mlp.down",
)


@dataclass(frozen=True)
class PruneOptions:
    """What may be set for `layers` and `width`, and for `neurons` and `heads` too.

    Args:
        keep: the share of units that stays.
        order: whether importance is of `first` or `second` order; see `importance`.
        rows: training rows that it is measured on, one at a time.
        recover: whether the model is trained on afterwards, as `recovery` says.
    """

    keep: Annotated[float, Gt(0), Lt(1)] = 0.5
    order: Order = "first"
    rows: Annotated[int, Ge(1)] = 512
    recover: bool = True
    recovery: Recovery = field(default_factory=Recovery)


@dataclass(frozen=True)
class UnitOptions(PruneOptions):
    """What may be set for `neurons` and `heads`.

    Args:
        scope: whether units compete over the whole `model`, so that layers keep unequal numbers, or each `layer` keeps
            the same share. One a layer stays in any case.
    """

    scope: Scope = "model"


@dataclass(frozen=True)
class NeuronOptions(UnitOptions):
    """What may be set for `neurons`.

    Args:
        multiple: of what a layer's number of neurons is brought to, the nearest: products of odd sizes are slow, and
            weights in groups or patterns need rows that these divide.
    """

    multiple: Annotated[int, Ge(1)] = 32


class Prune(Method):
    """Take out the units of one kind that matter least, and train on."""

    stage: ClassVar[Stage] = "prune"
    kind: ClassVar[Kind]
    after: ClassVar[Mapping[Stage, str]] = {
        "factorise": "since it needs the matrices whole",
        "exits": "since thresholds hold for the layers that they were chosen with",
        "sparsify": "since training would fill what was set to 0",
        "quantise": "since importance is measured, and training goes on, in full precision",
    }

    def check(self, subject: Loaded, options: PruneOptions) -> None:
        trunk = plain_transformer(subject.model, self.name)
        _check_whole(trunk, self.name)
        if subject.task.couples:
            what = f"'{subject.task.name}' compares the examples of a batch: none has a loss alone to measure by"
            raise UserError(what, where=self.name, hint="distil it")
        sizes = sizes_of(trunk, self.kind)
        self._check_acts(sum(sizes), sum(counts_of(sizes, options.keep, _scope(options), self.step(trunk, options))))

    def _check_acts(self, units: int, left: int) -> None:
        if left >= units:
            hint = "give a smaller share" + (", or a smaller multiple" if self.kind == "neurons" else "")
            raise UserError(f"keeps all of {units} {self.kind}", where=f"{self.name}.keep", hint=hint)

    def apply(self, subject: Loaded, material: Material, options: PruneOptions) -> tuple[Loaded, dict[str, float]]:
        self.check(subject, options)
        trunk = plain_transformer(subject.model, self.name)
        before, units = num_weights(subject.model), sum(sizes_of(trunk, self.kind))
        rows = material.sample(options.rows)
        scores = importance(subject, rows, self.kind, options.order, material.progress)
        kept = choose(self.raised(trunk, scores), options.keep, _scope(options), self.step(trunk, options))
        self._check_acts(units, sum(len(one) for one in kept))
        subject = self.remove(subject, kept)
        left, after = sum(sizes_of(plain_transformer(subject.model, self.name), self.kind)), num_weights(subject.model)
        material.note(f"{left:,} of {units:,} {self.kind} stay: {', '.join(str(len(one)) for one in kept)}")
        total = sum(float(one.sum()) for one in scores)
        stays = sum(float(one[those].sum()) for one, those in zip(scores, kept, strict=True))
        found = {
            f"{self.kind}_before": units,
            f"{self.kind}_after": left,
            f"{self.kind}_removed": units - left,
            "weights_before": before,
            "weights_after": after,
            "importance_rows": len(rows),
            "importance_kept": stays / total if total else 1.0,
        }
        effect = recover(subject, material, options.recovery) if options.recover else {}
        return subject, {name: float(value) for name, value in found.items()} | effect

    def raised(self, trunk: Transformer, scores: Sequence[Float[Tensor, "unit"]]) -> Sequence[Float[Tensor, "unit"]]:
        """The scores, those of units that cannot go raised."""
        return scores

    def step(self, trunk: Transformer, options: PruneOptions) -> int:
        """What the number of units that stay, in each layer, is a multiple of."""
        return 1

    @abstractmethod
    def remove(self, subject: Loaded, kept: Sequence[Int[Tensor, "kept"]]) -> Loaded:
        """Leave these units alone, in the model as it stands or a new one."""


@register
class Neurons(Prune):
    """Take neurons out of feed-forward layers; of gated ones their gates too."""

    name: ClassVar[str] = "neurons"
    kind: ClassVar[Kind] = "neurons"
    Options: ClassVar[type] = NeuronOptions

    def step(self, trunk: Transformer, options: PruneOptions) -> int:
        return options.multiple if isinstance(options, NeuronOptions) else 1

    def remove(self, subject: Loaded, kept: Sequence[Int[Tensor, "kept"]]) -> Loaded:
        trunk = plain_transformer(subject.model, self.name)
        for block, units in zip(blocks_of(trunk), kept, strict=True):
            shrink(block, {"width": units})
        widths = [len(units) for units in kept]
        if len(set(widths)) == 1:
            # Said once for all layers, other programs read it too.
            layers = tuple(replace(own, intermediate_size=None) for own in trunk.config.layers)
            trunk.config = replace(trunk.config, intermediate_size=widths[0], layers=layers)
        else:
            owns = zip(overrides_of(trunk.config), widths, strict=True)
            trunk.config = replace(trunk.config, layers=tuple(replace(own, intermediate_size=w) for own, w in owns))
        return subject


@register
class Heads(Prune):
    """Take attention heads out; those that share their keys go together."""

    name: ClassVar[str] = "heads"
    kind: ClassVar[Kind] = "heads"
    Options: ClassVar[type] = UnitOptions

    def check(self, subject: Loaded, options: PruneOptions) -> None:
        super().check(subject, options)
        if plain_transformer(subject.model, self.name).config.positions == "relative":
            hint = "prune neurons or layers"
            raise UserError("all layers share the biases of their heads", where=self.name, hint=hint)

    def remove(self, subject: Loaded, kept: Sequence[Int[Tensor, "kept"]]) -> Loaded:
        trunk = plain_transformer(subject.model, self.name)
        layers: list[LayerOverride] = []
        owns = overrides_of(trunk.config)
        for index, (block, own, units) in enumerate(zip(blocks_of(trunk), owns, kept, strict=True)):
            shape, dim = trunk.config.layer(index), block.attention.head_dim
            shared = shape.num_heads // shape.num_kv_heads
            shrink(block, {"heads": rows_of(units, shared * dim), "kv_heads": rows_of(units, dim)})
            layers.append(replace(own, num_heads=len(units) * shared, num_kv_heads=len(units)))
        trunk.config = replace(trunk.config, layers=tuple(layers))
        return subject


@register
class Layers(Prune):
    """Take whole layers out."""

    name: ClassVar[str] = "layers"
    kind: ClassVar[Kind] = "layers"
    Options: ClassVar[type] = PruneOptions

    def raised(self, trunk: Transformer, scores: Sequence[Float[Tensor, "unit"]]) -> Sequence[Float[Tensor, "unit"]]:
        if trunk.config.first_norm:
            return scores
        # No other layer can be the first where that one has no norm of its own.
        return [one.index_fill(0, torch.tensor([0], device=one.device), torch.inf) for one in scores]

    def remove(self, subject: Loaded, kept: Sequence[Int[Tensor, "kept"]]) -> Loaded:
        keep_layers(subject.model, kept[0].tolist())
        return subject


@register
class HiddenWidth(Prune):
    """Take units of the hidden state out, everywhere; their number is a multiple of a head's size."""

    name: ClassVar[str] = "width"
    kind: ClassVar[Kind] = "width"
    Options: ClassVar[type] = PruneOptions

    def check(self, subject: Loaded, options: PruneOptions) -> None:
        super().check(subject, options)
        trunk = plain_transformer(subject.model, self.name)
        [count] = counts_of(sizes_of(trunk, self.kind), options.keep, "layer", self.step(trunk, options))
        slimmed(trunk.config, count)

    def step(self, trunk: Transformer, options: PruneOptions) -> int:
        return trunk.config.head_dim

    def remove(self, subject: Loaded, kept: Sequence[Int[Tensor, "kept"]]) -> Loaded:
        return replace(subject, model=slim(subject, kept[0]))


def _scope(options: PruneOptions) -> Scope:
    return options.scope if isinstance(options, UnitOptions) else "layer"


def _check_whole(trunk: Transformer, where: str) -> None:
    for index, block in enumerate(blocks_of(trunk)):
        layers = dict(block.named_modules())
        for place in _MATRICES:
            if layers.get(place) is not None and not is_dense(layers[place]):
                hint = "merge what was put beside it, or prune before it is quantised"
                raise UserError(f"'layers.{index}.{place}' is not a whole matrix", where=where, hint=hint)
