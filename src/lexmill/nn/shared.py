"""Layers that share their weights (Lan et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import nn


class SharedLayers(nn.ModuleList):
    """Layers as a token goes through them, some of which are the same module.

    Length, order and indices are those of running. A module that runs several times is registered once, so that its
    parameters have one name and are counted, trained and saved once.

    Args:
        stored: the modules.
        schedule: for each layer in the order they run, which of the modules it is.
    """

    def __init__(self, stored: Iterable[nn.Module], schedule: Sequence[int]) -> None:
        super().__init__()
        for index, module in enumerate(stored):
            self.add_module(str(index), module)
        self.schedule = tuple(schedule)

    def __len__(self) -> int:
        return len(self.schedule)

    def __iter__(self) -> Iterator[nn.Module]:
        return (self.get_submodule(str(index)) for index in self.schedule)

    def __getitem__(self, idx: int | slice) -> Any:
        if isinstance(idx, slice):
            return nn.ModuleList(list(self)[idx])
        return self.get_submodule(str(self.schedule[idx]))

    def __setitem__(self, idx: int, module: nn.Module) -> None:
        setattr(self, str(self.schedule[idx]), module)
