"""Moving ranks to the layers that need them while training (Zhang et al. 2023, AdaLoRA)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lexmill.adapt.config import AdaptConfig
from lexmill.errors import UserError
from lexmill.nn.svd import Svd, SvdLinear


class RankAllocator:
    """Takes singular values out where they matter least, over all layers, until a budget is met.

    How much a weight matters is its sensitivity |w · ∇w|, smoothed over steps, times how uncertain that is (section
    3.2). A singular value's importance is its own and the mean of each of its vectors'. The budget falls by a cubic
    from the initial to the final rank; then the choice is fixed (section 3.3). A value taken out before that may come
    back, since its gradient goes on.

    Args:
        trunk: holds the `SvdLinear` layers, at least one.
    """

    def __init__(self, trunk: nn.Module, config: AdaptConfig) -> None:
        if config.start_rank <= config.rank:
            hint = f"more than adapt.rank, which is {config.rank}"
            raise UserError("the initial rank leaves nothing to take out", where="adapt.initial_rank", hint=hint)
        if config.tinit + config.tfinal >= 1:
            raise UserError(
                "no step is left in which ranks move", where="adapt.tinit", hint="lower it, or adapt.tfinal"
            )
        self.config = config
        self.adapters: dict[str, Svd] = {
            path: layer.adapter for path, layer in trunk.named_modules() if isinstance(layer, SvdLinear)
        }
        self._smooth = {name: torch.zeros_like(p) for name, p in self._parameters()}
        self._uncertain = {name: torch.zeros_like(p) for name, p in self._parameters()}
        self.kept: dict[str, Bool[Tensor, "rank"]] = {
            path: torch.ones_like(adapter.values, dtype=torch.bool) for path, adapter in self.adapters.items()
        }
        self._penalty = 0.0

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [
            (f"{path}.{name}", p)
            for path, adapter in self.adapters.items()
            for name, p in adapter.named_parameters(recurse=False)
        ]

    # --- a step -----------------------------------------------------------------------------------------------
    def before_update(self, step: int, steps: int, scale: float = 1.0) -> None:
        """Add the gradient of the penalty, and take note of how much each weight matters."""
        penalty = torch.stack([adapter.penalty() for adapter in self.adapters.values()]).mean()
        if self.config.orthogonality:
            (self.config.orthogonality * scale * penalty).backward()
        self._penalty = float(penalty.detach())
        overflowed = any(p.grad is not None and not bool(p.grad.isfinite().all()) for _, p in self._parameters())
        if step > self._last_choice(steps) or overflowed:
            return
        beta1, beta2 = self.config.beta1, self.config.beta2
        with torch.no_grad():
            for name, p in self._parameters():
                if p.grad is not None:
                    now = (p * p.grad / scale).abs()
                    self._smooth[name].lerp_(now, 1 - beta1)
                    self._uncertain[name].lerp_((now - self._smooth[name]).abs(), 1 - beta2)

    def after_update(self, step: int, steps: int) -> dict[str, float]:
        """Take singular values out where this step is one for it; gives the event's numbers."""
        said = {"orthogonality": self._penalty, "rank_budget": float(self.budget(step, steps))}
        if self._moves(step, steps):
            self._choose(self.budget(step, steps))
        elif step <= self._last_choice(steps):
            return said
        with torch.no_grad():
            for path, adapter in self.adapters.items():
                adapter.values.mul_(self.kept[path])
        return said | self.ranks() if self._moves(step, steps) else said

    def budget(self, step: int, steps: int) -> int:
        """How many singular values all layers may have together after this step."""
        first, last = self._first_choice(steps), self._last_choice(steps)
        start, target = len(self.adapters) * self.config.start_rank, len(self.adapters) * self.config.rank
        if step < first:
            return start
        if step >= last:
            return target
        return target + round((start - target) * (1 - (step - first) / (last - first)) ** 3)

    def settled(self, step: int, steps: int) -> bool:
        """Whether the ranks are within their final budget after this step."""
        return step >= self._last_choice(steps)

    def _first_choice(self, steps: int) -> int:
        return min(round(self.config.tinit * steps), self._last_choice(steps))

    def _last_choice(self, steps: int) -> int:
        return steps - max(1, round(self.config.tfinal * steps))

    def _moves(self, step: int, steps: int) -> bool:
        first, last = self._first_choice(steps), self._last_choice(steps)
        every = max(1, round(self.config.delta_t * steps))
        return step == last or (first <= step < last and (step - first) % every == 0)

    def _choose(self, budget: int) -> None:
        scores = [self._importance(path) for path in self.adapters]
        best = torch.cat(scores).argsort(descending=True, stable=True)[:budget]
        kept = torch.zeros(sum(map(len, scores)), dtype=torch.bool, device=best.device)
        kept[best] = True
        self.kept = dict(zip(self.adapters, kept.split([len(one) for one in scores]), strict=True))

    def _importance(self, path: str) -> Float[Tensor, "rank"]:
        def of(name: str) -> Tensor:
            return self._smooth[f"{path}.{name}"] * self._uncertain[f"{path}.{name}"]

        return of("values") + of("p").mean(0) + of("q").mean(1)

    # --- the record -------------------------------------------------------------------------------------------
    def ranks(self) -> dict[str, float]:
        """The rank of each layer now."""
        return {f"rank/{path}": float(adapter.rank()) for path, adapter in self.adapters.items()}

    def effect(self) -> dict[str, float]:
        """What became of the ranks."""
        ranks = self.ranks()
        start = float(len(ranks) * self.config.start_rank)
        return {"rank_total_before": start, "rank_total": sum(ranks.values()), **ranks}

    def state(self) -> dict[str, Tensor]:
        """All that a resumed run needs, by name."""
        return {
            **{f"{name}.sensitivity": t for name, t in self._smooth.items()},
            **{f"{name}.uncertainty": t for name, t in self._uncertain.items()},
            **{f"{path}.kept": t for path, t in self.kept.items()},
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        for name in self._smooth:
            self._smooth[name].copy_(state[f"{name}.sensitivity"])
            self._uncertain[name].copy_(state[f"{name}.uncertainty"])
        self.kept = {path: state[f"{path}.kept"].to(kept.device) for path, kept in self.kept.items()}
