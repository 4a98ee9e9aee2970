"""A moving average of the weights (Polyak and Juditsky, 1992), which is what is validated and kept."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """The exponential moving average of the parameters that are trained.

    Early on it forgets faster, so that the first weights do not linger: after `n` updates the decay is at most
    `(1 + n) / (10 + n)`.

    Args:
        decay: share of the old average that an update keeps, below 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = torch.zeros((), dtype=torch.int64)
        self._live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._kept = {name: p.detach().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights as they are now into the average."""
        self.updates += 1
        count = int(self.updates)
        decay = min(self.decay, (1 + count) / (10 + count))
        for name, kept in self._kept.items():
            kept.lerp_(self._live[name].detach(), 1 - decay)

    @contextmanager
    def applied(self) -> Generator[None]:
        """While open, the model has the averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, p in self._live.items():
            kept = self._kept[name]
            held = p.detach().clone()
            p.copy_(kept)
            kept.copy_(held)

    @torch.no_grad()
    def put(self) -> float:
        """Leave the model with the average. Gives how far that is from the weights it had: the norm of the difference
        over theirs."""
        apart = torch.stack([(self._kept[name] - p).norm() for name, p in self._live.items()]).norm()
        size = torch.stack([p.norm() for p in self._live.values()]).norm()
        for name, p in self._live.items():
            p.copy_(self._kept[name])
        return float(apart / size)

    def state(self) -> dict[str, Tensor]:
        return {**self._kept, "updates": self.updates}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        self.updates.copy_(state["updates"])
        for name, kept in self._kept.items():
            kept.copy_(state[name])
