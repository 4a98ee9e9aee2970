"""What goes into the layers of a model, and the grids of 8 bits that hold it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lexmill.compress.base import batches
from lexmill.engine import Loaded
from lexmill.errors import UserError
from lexmill.models.trunk import Trunk
from lexmill.nn.attention import Attention
from lexmill.nn.int8 import LEVELS, Grid
from lexmill.nn.linear import Linear
from lexmill.nn.mlp import MLP
from lexmill.tasks import Record

Clip = Literal["max", "percentile", "mse"]
_BINS = 2048
_SHARE = 0.9999
"""Of all inputs, what `percentile` keeps."""


@dataclass(frozen=True)
class Group:
    """Layers that read the same rows, and so share a grid.

    Args:
        smooths: whether columns may be divided before they are put on the grid: hidden states, some of whose columns
            reach far beyond the others (Dettmers et al. 2022, section 4), and what attention mixes. What an activation
            gives is put on its grid on the way out of a product, where there is nothing to divide.
    """

    places: tuple[str, ...]
    smooths: bool = False


def groups_of(trunk: Trunk) -> list[Group]:
    """The dense layers of a trunk's layers, in order."""
    found: list[Group] = []
    grouped: set[str] = set()
    for path, module in trunk.layers.named_modules(prefix="layers"):
        if isinstance(module, (Attention, MLP)):
            of_attention = ("query", "key", "value"), ("output",)
            for names in of_attention if isinstance(module, Attention) else (("gate", "up"),):
                paths = tuple(f"{path}.{name}" for name in names if is_dense(getattr(module, name)))
                found += [Group(paths, smooths=True)] if paths else []
                grouped |= set(paths)
        elif is_dense(module) and path not in grouped:
            found.append(Group((path,)))
    return found


def groups_without(trunk: Trunk, skip: Sequence[str]) -> list[Group]:
    """The dense layers of a trunk's layers but for those at or below the places in `skip`, in order.

    Raises:
        UserError: there is none at such a place, or none is left.
    """
    groups = groups_of(trunk)
    places = [place for group in groups for place in group.places]
    if not places:
        raise UserError("the model has no linear layers in its layers", hint="distil or prune it")
    for given in skip:
        if not any(is_within(place, given) for place in places):
            raise UserError(f"there is no linear layer at '{given}'", where="skip", hint=f"one is '{places[0]}'")
    kept = [(tuple(p for p in one.places if not any(is_within(p, given) for given in skip)), one) for one in groups]
    found = [Group(places, one.smooths) for places, one in kept if places]
    if not found:
        raise UserError("every layer is skipped", where="skip", hint="leave some out")
    return found


def is_within(place: str, given: str) -> bool:
    """Whether a place is another one, or below it."""
    return place == given or place.startswith(f"{given}.")


def is_dense(module: nn.Module | None) -> bool:
    """Whether it is a linear layer with its whole matrix."""
    return type(module) is Linear and module.quantised is None


def reaches(
    subject: Loaded, rows: Sequence[Record], groups: Sequence[Group]
) -> dict[Group, tuple[Float[Tensor, "in"], Float[Tensor, "in"]]]:
    """By group the least and the largest input, column by column."""
    found: dict[Group, tuple[Tensor, Tensor]] = {}

    def see(group: Group, x: Tensor) -> None:
        low, high = torch.aminmax(x, dim=0)
        if group in found:
            low, high = torch.minimum(low, found[group][0]), torch.maximum(high, found[group][1])
        found[group] = low, high

    _watch(subject, rows, groups, see)
    return found


def grids(
    subject: Loaded,
    rows: Sequence[Record],
    reached: Mapping[Group, tuple[Tensor, Tensor]],
    divisors: Mapping[Group, Tensor],
    clip: Clip,
) -> dict[Group, Grid]:
    """By group the grid for its inputs, each column divided by its divisor where there are such."""
    ends: dict[Group, tuple[float, float]] = {}
    for group, (low, high) in reached.items():
        by = divisors.get(group, torch.ones_like(low))
        ends[group] = float((low / by).min()), float((high / by).max())
    if clip == "max":
        return {group: Grid.over(*end) for group, end in ends.items()}
    counts = {group: torch.zeros(_BINS) for group in ends}

    def see(group: Group, x: Tensor) -> None:
        low, high = ends[group]
        counts[group] += torch.histc(x / divisors[group] if group in divisors else x, _BINS, low, high)

    _watch(subject, rows, list(ends), see)
    choose = _by_percentile if clip == "percentile" else _by_error
    return {group: choose(counts[group].double(), *ends[group]) for group in ends}


def _by_percentile(counts: Float[Tensor, "bin"], low: float, high: float) -> Grid:
    below = counts.cumsum(0) / counts.sum()
    edges = torch.linspace(low, high, _BINS + 1, dtype=torch.float64)
    outside = (1 - _SHARE) / 2
    first, last = int((below <= outside).sum()), int((below < 1 - outside).sum())
    return Grid.over(float(edges[first]), float(edges[last + 1]))


def _by_error(counts: Float[Tensor, "bin"], low: float, high: float) -> Grid:
    """The grid of the least mean square error, among those that reach a share as far."""
    edges = torch.linspace(low, high, _BINS + 1, dtype=torch.float64)
    middles = (edges[1:] + edges[:-1]) / 2

    def error(grid: Grid) -> float:
        codes = (middles / grid.scale + grid.zero).round().clamp(0, LEVELS)
        return float((counts * ((codes - grid.zero) * grid.scale - middles).square()).sum())

    return min((Grid.over(low * share / 20, high * share / 20) for share in range(20, 3, -1)), key=error)


def _watch(
    subject: Loaded, rows: Sequence[Record], groups: Sequence[Group], see: Callable[[Group, Tensor], None]
) -> None:
    def hear(group: Group, place: str) -> RemovableHandle:
        def before(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            see(group, given[0].detach().reshape(-1, given[0].shape[-1]).float())

        return subject.model.trunk.get_submodule(place).register_forward_pre_hook(before)

    hooks = [hear(group, place) for group in groups for place in group.places]
    try:
        outputs(subject, rows)
    finally:
        for hook in hooks:
            hook.remove()


def outputs(subject: Loaded, rows: Sequence[Record]) -> list[Tensor]:
    """What the heads give for these rows, batch by batch, in an order that depends on the rows alone."""
    found: list[Tensor] = []
    subject.model.eval()
    with torch.no_grad():
        for batch in batches(subject, rows, labelled=True):
            given = subject.task.forward(subject.model, batch)
            found += [given[name].float().flatten() for name in sorted(given)]
    return found


def apart(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """How far outputs are from others: the root mean square of their difference, as a share of what the others vary."""
    a, b = torch.cat(list(found)), torch.cat(list(wanted))
    return float((a - b).norm() / (b - b.mean()).norm())
