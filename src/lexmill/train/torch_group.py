"""Parameters under one of torch's own optimisers: SGD, Adafactor, Muon."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


class TorchGroup:
    """Parameters with dense gradients, updated by torch.

    Args:
        make: the optimiser, given parameter groups with their weight decay: matrices first, then vectors, which have
            none.
    """

    def __init__(self, params: Mapping[str, nn.Parameter], weight_decay: float, make: Make) -> None:
        self.params = dict(params)
        matrices = [p for p in self.params.values() if p.dim() > 1]
        vectors = [p for p in self.params.values() if p.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.inner = make([group for group in groups if group["params"]])
        self.steps = 0

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.params.values() if p.grad is not None]

    def step(self, learning_rate: float, grad_scale: Tensor | None) -> None:
        if grad_scale is not None and (grads := self.gradients()):
            torch._foreach_div_(grads, grad_scale)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        for group in self.inner.param_groups:
            group["lr"] = learning_rate
        self.inner.step()
        self.steps += 1

    def updated(self) -> int:
        """How many weights have been updated, by this process."""
        return sum(p.numel() for p in self.params.values()) if self.steps else 0

    def state(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, p in self.params.items():
            for kind, value in self.inner.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    found[f"{name}.{kind}"] = value
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        for full, value in state.items():
            name, _, kind = full.rpartition(".")
            if name in self.params:
                self.inner.state[self.params[name]][kind] = value.to(self.params[name].device).clone()


def sgd(momentum: float) -> Make:
    """Stochastic gradient descent with momentum (Polyak, 1964)."""
    return lambda groups: torch.optim.SGD(groups, lr=1.0, momentum=momentum)


def adafactor(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Second moments of matrices by row and column alone (Shazeer and Stern, 2018); the learning rate is a share of
    each parameter's size."""
    return torch.optim.Adafactor(groups, lr=1.0)


def muon(momentum: float) -> Make:
    """Updates of matrices made orthogonal (Jordan et al. 2024), scaled as large as AdamW's (Liu et al. 2025)."""
    return lambda groups: torch.optim.Muon(groups, lr=1.0, momentum=momentum, adjust_lr_fn="match_rms_adamw")
