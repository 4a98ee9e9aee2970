"""Int8: matrices, their inputs and tables of embeddings in bytes, and the traps that lie there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, cast

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from lexmill.compress.base import Material, Method, Stage, register
from lexmill.compress.calibrate import Clip, Group, apart, grids, groups_of, is_within, outputs, reaches
from lexmill.compress.recover import Recovery, recover
from lexmill.engine import Loaded
from lexmill.errors import UserError
from lexmill.models import Model
from lexmill.nn.embedding import Embedding, Int8Embedding
from lexmill.nn.fake_int8 import FakeInt8Linear
from lexmill.nn.int8 import Grid, Int8Linear, Scheme
from lexmill.nn.linear import Linear
from lexmill.tasks import Record

_MOST_SPARED = 0.5
"""Of the groups of layers; beyond that little would be gained."""
_ALPHA = 0.5
"""Of SmoothQuant, where it is to rescue."""


@dataclass(frozen=True)
class Aware(Recovery):
    """How a model is trained that rounds: shortly and with care, since it knows all but what rounding took."""

    epochs: Annotated[int, Ge(1)] = 2
    learning_rate: Annotated[float, Gt(0)] = 5e-5


@dataclass(frozen=True)
class Int8Options:
    """What may be set for `int8`.

    Args:
        scheme: `static`, inputs of a layer on one grid that is chosen on training rows, or `token`, every row on its
            own.
        rows: training rows that inputs are measured on.
        clip: how far a static grid reaches: to the farthest (`max`), over 99.99 % of inputs (`percentile`), or to the
            least mean square error (`mse`).
        smooth: α of SmoothQuant (Xiao et al. 2023), which moves the reach of columns of hidden states into the
            matrices; None for none, unless `rescue` needs it.
        skip: places of layers, such as `layers.0.mlp`, that stay as they are.
        rescue: whether, where outputs are not within `max_error`, columns are smoothed, and if that is not enough the
            most sensitive layers left as they are.
        max_error: how far outputs may be from those before: the root mean square, as a share of what they vary.
        embeddings: whether tables of embeddings become bytes too.
        train: whether the model is trained on with its layers rounding as they will (Jacob et al. 2018, section 3), as
            `recovery` says. The grids of inputs are chosen before; nothing is rescued afterwards.
    """

    scheme: Scheme = "static"
    rows: Annotated[int, Ge(1)] = 256
    clip: Clip = "max"
    smooth: Annotated[float, Ge(0), Lt(1)] | None = None
    skip: tuple[str, ...] = ()
    rescue: bool = True
    max_error: Annotated[float, Gt(0)] = 0.1
    embeddings: bool = True
    train: bool = False
    recovery: Aware = field(default_factory=Aware)


@register
class Int8(Method):
    """Integer products (Jacob et al. 2018), refused where they would change what the model says."""

    name: ClassVar[str] = "int8"
    stage: ClassVar[Stage] = "quantise"
    Options: ClassVar[type] = Int8Options
    after: ClassVar[Mapping[Stage, str]] = {"quantise": "since the matrices are not whole any more"}

    def check(self, subject: Loaded, options: Int8Options) -> None:
        if not groups_of(subject.model.trunk):
            raise UserError(f"'{subject.model.family}' has no linear layers in its layers", hint="distil or prune it")
        if options.embeddings and subject.model.has_tied_output:
            raise UserError("an output shares the embeddings", where="embeddings", hint="set embeddings = false")
        if options.scheme == "token" and options.clip != "max":
            hint = 'leave it out, or set scheme = "static"'
            raise UserError("the grid of a row reaches as far as the row", where="clip", hint=hint)
        places = [place for group in groups_of(subject.model.trunk) for place in group.places]
        for given in options.skip:
            if not any(is_within(place, given) for place in places):
                raise UserError(f"there is no linear layer at '{given}'", where="skip", hint=f"one is '{places[0]}'")

    def apply(self, subject: Loaded, material: Material, options: Int8Options) -> tuple[Loaded, dict[str, float]]:
        self.check(subject, options)
        rows, shown = material.sample(options.rows), list(material.validation)
        if not rows:
            raise UserError("there are no rows to measure on", where="train")
        before, wanted = _bytes(subject.model), outputs(subject, rows)
        checked = outputs(subject, shown) if shown else []
        layers, learnt = quantised(subject, rows, options), dict[str, float]()
        if options.train:
            layers, learnt = _trained(subject, material, options, layers)
            wanted, checked = outputs(subject, rows), outputs(subject, shown) if shown else []
        tables = _put_tables(subject.model) if options.embeddings else 0
        layers.put_all()
        found = apart(outputs(subject, rows), wanted)
        # Written so that a NaN is rescued or refused too.
        if options.rescue and not options.train and not found <= options.max_error:
            found = _rescued(subject, rows, wanted, layers, found, options, material)
        farther = max(found, apart(outputs(subject, shown), checked)) if shown else found
        if not farther <= options.max_error:
            hint = "set smooth = 0.5, scheme = 'token' or more rows; or a larger max_error, and look at what it costs"
            off = f"outputs are off by {farther:.1%}, and at most {options.max_error:.1%} was asked"
            raise UserError(f"int8 changes the answers: {off}", where="max_error", hint=hint)
        inside = [one for one in subject.model.modules() if isinstance(one, Int8Linear)]
        numbers = {
            "layers_int8": len(inside),
            "layers_smoothed": sum(one.divisor is not None for one in inside),
            "layers_skipped": sum(len(group.places) for group in groups_of(subject.model.trunk)),
            "kernels_int8": sum(one.ran == "onednn" for one in inside),
            "tables_int8": tables,
            "output_error": found,
            "validation_error": farther,
            "bytes_before": before,
            "bytes_after": _bytes(subject.model),
        }
        return subject, {name: float(value) for name, value in numbers.items()} | learnt


@dataclass(frozen=True)
class Swapped:
    """The same layers dense and in bytes, by place.

    Args:
        grids, divisors: by group what its inputs are put on and divided by, where that is the same for all rows.
    """

    trunk: nn.Module
    groups: Sequence[Group]
    dense: Mapping[str, Linear]
    grids: Mapping[Group, Grid]
    divisors: Mapping[Group, Tensor]
    int8: Mapping[str, nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "int8", self._made(Int8Linear.of))

    def _made(self, make: Callable[[Linear, Grid | None, Tensor | None], nn.Module]) -> dict[str, nn.Module]:
        return {
            place: make(self.dense[place], self.grids.get(group), self.divisors.get(group))
            for group in self.groups
            for place in group.places
        }

    def put_rounding(self) -> int:
        """Put layers in their places that round as those in bytes do, and learn. How many."""
        rounding = self._made(FakeInt8Linear.over)
        for place, layer in rounding.items():
            _put_at(self.trunk, place, layer)
        return len(rounding)

    def put(self, group: Group, *, back: bool = False) -> None:
        for place in group.places:
            _put_at(self.trunk, place, (self.dense if back else self.int8)[place])

    def put_all(self, *, back: bool = False) -> None:
        for group in self.groups:
            self.put(group, back=back)


def _put_at(trunk: nn.Module, place: str, layer: nn.Module) -> None:
    parent, _, name = place.rpartition(".")
    setattr(trunk.get_submodule(parent), name, layer)


def _trained(
    subject: Loaded, material: Material, options: Int8Options, layers: Swapped
) -> tuple[Swapped, dict[str, float]]:
    """The layers made of the matrices that were trained to be rounded, and what training did. The model rounds, but is
    not in bytes yet."""
    weights = [one.weight.detach().clone() for one in layers.dense.values()]
    count = layers.put_rounding()
    effect = recover(subject, material, options.recovery)
    moved = sum(
        float((one.weight.detach() - before).norm()) ** 2
        for one, before in zip(layers.dense.values(), weights, strict=True)
    )
    share = (moved / sum(float(before.norm()) ** 2 for before in weights)) ** 0.5
    if not share:
        raise UserError("training has moved no weight", where="recovery", hint="raise the learning rate or the epochs")
    made = Swapped(layers.trunk, layers.groups, layers.dense, layers.grids, layers.divisors)
    return made, {"layers_trained_rounding": float(count), "weights_moved": share, **effect}


def quantised(subject: Loaded, rows: Sequence[Record], options: Int8Options) -> Swapped:
    """The layers that are to be int8, and what they become; nothing is put in their places yet."""
    trunk = subject.model.trunk
    groups = [
        group
        for group in groups_of(trunk)
        if not any(is_within(place, given) for place in group.places for given in options.skip)
    ]
    if not groups:
        raise UserError("every layer is skipped", where="skip", hint="leave some out")
    dense = {place: cast("Linear", trunk.get_submodule(place)) for group in groups for place in group.places}
    divisors: dict[Group, Tensor] = {}
    chosen: dict[Group, Grid] = {}
    if options.smooth is not None or options.scheme == "static":
        reached = reaches(subject, rows, groups)
        if options.smooth is not None:
            for group in (one for one in groups if one.smooths):
                weights = [dense[place].weight.detach().float() for place in group.places]
                divisors[group] = _divisor(reached[group], torch.cat(weights), options.smooth)
        if options.scheme == "static":
            chosen = grids(subject, rows, reached, divisors, options.clip)
    return Swapped(trunk, groups, dense, chosen, divisors)


def _divisor(reached: tuple[Tensor, Tensor], weight: Tensor, alpha: float) -> Tensor:
    """By column, `max|x|^α / max|w|^(1−α)` (equation 4)."""
    low, high = reached
    inputs, weights = torch.maximum(-low, high).clamp_min(1e-5), weight.abs().amax(0).clamp_min(1e-5)
    return (inputs**alpha / weights ** (1 - alpha)).clamp_min(1e-5)


def _rescued(
    subject: Loaded,
    rows: Sequence[Record],
    wanted: Sequence[Tensor],
    layers: Swapped,
    found: float,
    options: Int8Options,
    material: Material,
) -> float:
    """How far outputs are once columns are smoothed, where that helps, and layers spared, where that is not enough."""
    if options.smooth is None:
        layers.put_all(back=True)
        smoothed = quantised(subject, rows, replace(options, smooth=_ALPHA))
        smoothed.put_all()
        then = apart(outputs(subject, rows), wanted)
        material.note(f"outputs are off by {found:.1%}, and by {then:.1%} with columns smoothed")
        if then < found or found != found:
            layers, found = smoothed, then
        else:
            layers.put_all()
    return found if found <= options.max_error else _spare(subject, rows, wanted, layers, options.max_error, material)


def _spare(
    subject: Loaded,
    rows: Sequence[Record],
    wanted: Sequence[Tensor],
    layers: Swapped,
    most: float,
    material: Material,
) -> float:
    """Leave the most sensitive groups as they are, one after the other, until outputs are near enough or half of all
    groups are left out. How far they are then."""
    layers.put_all(back=True)
    alone: dict[Group, float] = {}
    for group in layers.groups:
        layers.put(group)
        alone[group] = apart(outputs(subject, rows), wanted)
        layers.put(group, back=True)
        material.progress(len(alone) / len(layers.groups))
    layers.put_all()
    found = apart(outputs(subject, rows), wanted)
    worst = sorted(layers.groups, key=alone.__getitem__, reverse=True)
    for group in worst[: int(_MOST_SPARED * len(worst))]:
        if found <= most:
            break
        layers.put(group, back=True)
        found = apart(outputs(subject, rows), wanted)
        material.note(f"{group.places[0]} stays as it is: alone it moves outputs by {alone[group]:.1%}")
    return found


def _put_tables(model: Model) -> int:
    """Make bytes of the tables of tokens and positions. How many."""
    embeddings = model.trunk.embeddings
    tables = {name: one for name, one in embeddings.named_children() if name in ("token", "position")}
    found = {name: one for name, one in tables.items() if isinstance(one, Embedding)}
    for name, table in found.items():
        setattr(embeddings, name, Int8Embedding.of(table))
    return len(found)


def _bytes(model: Model) -> int:
    return sum(one.numel() * one.element_size() for one in model.state_dict().values())
