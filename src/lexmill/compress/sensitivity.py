"""How much the answers of a model change where one layer of it is taken out, or put in 8 bits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

from lexmill.compress.calibrate import apart, groups_of, outputs
from lexmill.compress.narrow import Choose, chosen_layers, keep_layers, plain_transformer
from lexmill.compress.quantise import Int8Options, quantised
from lexmill.engine import Loaded
from lexmill.errors import UserError
from lexmill.tasks import Record

STANDS_OUT = 3.0
"""A group of layers is left out of int8 where alone it changes answers so many times as much as the median group."""

CLEARLY = 0.5
"""The share of the change of evenly spaced layers that another choice must stay below."""


@dataclass(frozen=True)
class Sensitivity:
    """The root mean square change of what the heads give, as a share of what that varies (`calibrate.apart`).

    Args:
        int8: by place, with this layer and those that read the same rows in static int8 alone.
        without: by number, with this layer of the trunk taken out alone; empty for trunks that have none to take out.
    """

    int8: Mapping[str, float] = field(default_factory=dict[str, float])
    without: Sequence[float] = ()

    @property
    def to_skip(self) -> tuple[str, ...]:
        """The places that stand out in int8; none where too many do."""
        if not self.int8:
            return ()
        middle = sorted(self.int8.values())[len(self.int8) // 2]
        found = tuple(place for place, change in self.int8.items() if not change <= STANDS_OUT * middle)
        return found if len(found) <= len(self.int8) // 2 else ()

    def best_choice(self, layers: int) -> Choose:
        """How to choose so many layers: evenly spaced, unless another way changes answers clearly less."""
        lost: dict[Choose, float] = {how: self._lost(layers, how) for how in get_args(Choose)}
        best = min(lost, key=lost.__getitem__)
        return best if lost[best] < CLEARLY * lost["spaced"] else "spaced"

    def _lost(self, layers: int, how: Choose) -> float:
        kept = set(chosen_layers(len(self.without), layers, how)) if self.without else set()
        return sum(change for index, change in enumerate(self.without) if index not in kept)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_sensitivity(
    subject: Loaded, rows: Sequence[Record], progress: Callable[[float], None] = lambda share: None
) -> Sensitivity:
    """Change one part of a model at a time. The model is as before afterwards."""
    wanted = outputs(subject, rows)
    groups, depth = groups_of(subject.model.trunk), _removable(subject)
    int8: dict[str, float] = {}
    done, steps = itertools.count(1), len(groups) + depth
    if groups:
        layers = quantised(subject, rows, Int8Options())
        for group in layers.groups:
            layers.put(group)
            int8[group.places[0]] = apart(outputs(subject, rows), wanted)
            layers.put(group, back=True)
            progress(next(done) / steps)
    without: list[float] = []
    for index in range(depth):
        with _taken_out(subject, index) as possible:
            without.append(apart(outputs(subject, rows), wanted) if possible else math.inf)
        progress(next(done) / steps)
    return Sensitivity(int8, without)


def _removable(subject: Loaded) -> int:
    """How many layers could be taken out, one at a time."""
    try:
        layers = len(plain_transformer(subject.model, "layers").layers)
    except UserError:
        return 0
    return layers if layers > 1 else 0


@contextmanager
def _taken_out(subject: Loaded, index: int) -> Generator[bool]:
    """The model without one layer, and whether that is possible."""
    trunk = plain_transformer(subject.model, "layers")
    layers, config = trunk.layers, trunk.config
    try:
        keep_layers(subject.model, [one for one in range(len(layers)) if one != index])
        possible = True
    except UserError:  # the first layer of a family in which it has no norm of its own
        possible = False
    try:
        yield possible
    finally:
        trunk.layers, trunk.config = layers, config
