"""The update: AdamW (Loshchilov and Hutter, 2019), row-sparse for embeddings, or another of torch's optimisers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.adamw import adamw

from lexmill.errors import UserError
from lexmill.models import Model
from lexmill.nn.embedding import Embedding
from lexmill.train.config import TrainConfig
from lexmill.train.torch_group import TorchGroup, adafactor, muon, sgd


@dataclass(frozen=True)
class AdamW:
    """The hyper-parameters of one update, shared by dense and row-sparse parameters."""

    beta1: float
    beta2: float
    epsilon: float

    def update(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        first: list[Tensor],
        second: list[Tensor],
        steps: list[Tensor],
        *,
        learning_rate: float,
        weight_decay: float,
        grad_scale: Tensor | None = None,
    ) -> None:
        """One update in place, by torch's fused kernel. `steps` are float32 scalars, counted up here.

        Args:
            grad_scale: what gradients are divided by first, inside the kernel: clipping without a pass of its own.
        """
        adamw(
            params, grads, first, second, [], steps,
            foreach=False, fused=True, grad_scale=grad_scale, amsgrad=False, maximize=False,
            beta1=self.beta1, beta2=self.beta2, lr=learning_rate, weight_decay=weight_decay, eps=self.epsilon,
        )  # fmt: skip


class DenseGroup:
    """Parameters with dense gradients and one weight decay."""

    def __init__(self, params: Mapping[str, nn.Parameter], weight_decay: float) -> None:
        self.params = dict(params)
        self.weight_decay = weight_decay
        self.first = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.second = {name: torch.zeros_like(p) for name, p in self.params.items()}
        self.steps = {name: torch.zeros((), dtype=torch.float32, device=p.device) for name, p in self.params.items()}

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.params.values() if p.grad is not None]

    def step(self, rule: AdamW, learning_rate: float, grad_scale: Tensor | None) -> None:
        names = [name for name, p in self.params.items() if p.grad is not None]
        if not names:
            return
        rule.update(
            [self.params[n] for n in names],
            [g for n in names if (g := self.params[n].grad) is not None],
            [self.first[n] for n in names],
            [self.second[n] for n in names],
            [self.steps[n] for n in names],
            learning_rate=learning_rate,
            weight_decay=self.weight_decay,
            grad_scale=grad_scale,
        )

    def updated(self) -> int:
        """How many weights have been updated."""
        return sum(p.numel() for name, p in self.params.items() if self.steps[name])

    def state(self) -> dict[str, Tensor]:
        return {
            f"{name}.{kind}": table[name]
            for name in self.params
            for kind, table in (("exp_avg", self.first), ("exp_avg_sq", self.second), ("step", self.steps))
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name in self.params:
            self.first[name].copy_(state[f"{name}.exp_avg"])
            self.second[name].copy_(state[f"{name}.exp_avg_sq"])
            self.steps[name].copy_(state[f"{name}.step"])


class RowSparse:
    """One embedding table whose optimiser state covers only the rows that any batch has used.

    A row never used has zero moments, so dense AdamW would change it by weight decay alone. That decay is deferred:
    `pending` is the product of the factors that unused rows have missed; a row receives it just before its first
    use (a forward hook sees the ids), and `settle` gives it to all others. The arithmetic of the used rows is that of
    the dense update.
    """

    def __init__(self, name: str, table: Embedding, weight_decay: float) -> None:
        weight = table.weight
        self.name, self.table, self.weight_decay = name, table, weight_decay
        self.slots: Int[Tensor, "vocab"] = torch.full((weight.shape[0],), -1, dtype=torch.int64, device=weight.device)
        self.rows: Int[Tensor, "used"] = torch.empty(0, dtype=torch.int64, device=weight.device)
        self.first: Float[Tensor, "used dim"] = weight.new_zeros(0, weight.shape[1]).detach()
        self.second: Float[Tensor, "used dim"] = torch.zeros_like(self.first)
        self.steps = torch.zeros((), dtype=torch.float32, device=weight.device)
        self.pending = 1.0
        self._hook = table.register_forward_pre_hook(self._before_forward)

    def close(self) -> None:
        self.settle()
        self._hook.remove()

    def _before_forward(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if module.training and torch.is_grad_enabled():
            self._use(args[0].reshape(-1))
        elif self.pending != 1.0:
            self.settle()

    @torch.no_grad()
    def _use(self, ids: Int[Tensor, "tok"]) -> None:
        new = ids[self.slots[ids] < 0].unique()
        if not len(new):
            return
        if self.pending != 1.0:
            self.table.weight[new] *= self.pending
        used = len(self.rows)
        self.slots[new] = torch.arange(used, used + len(new), device=new.device)
        self.rows = torch.cat([self.rows, new])
        empty = self.first.new_zeros(len(new), self.first.shape[1])
        self.first = torch.cat([self.first, empty])
        self.second = torch.cat([self.second, empty])

    @torch.no_grad()
    def settle(self) -> None:
        """Give all unused rows the decay they have missed."""
        if self.pending != 1.0:
            self.table.weight[self.slots < 0] *= self.pending
            self.pending = 1.0

    def gradient(self) -> Tensor | None:
        """The rows' summed gradients, in place of the raw ones; None where no batch used the table."""
        grad = self.table.weight.grad
        if grad is None:
            return None
        self.table.weight.grad = grad = grad.coalesce()
        return grad.values()

    @torch.no_grad()
    def step(self, rule: AdamW, learning_rate: float, grad_scale: Tensor | None) -> None:
        weight, grad = self.table.weight, self.table.weight.grad
        if grad is None:
            return
        used_grad = torch.zeros_like(self.first)
        used_grad[self.slots[grad.indices()[0]]] = grad.values()
        rows = weight[self.rows]
        rule.update(
            [rows], [used_grad], [self.first], [self.second], [self.steps],
            learning_rate=learning_rate, weight_decay=self.weight_decay, grad_scale=grad_scale,
        )  # fmt: skip
        weight[self.rows] = rows
        self.pending *= 1 - learning_rate * self.weight_decay

    def updated(self) -> int:
        """How many weights have been updated: those of the rows that occurred."""
        return self.first.numel()

    def state(self) -> dict[str, Tensor]:
        self.settle()
        return {
            f"{self.name}.rows": self.rows,
            f"{self.name}.exp_avg": self.first,
            f"{self.name}.exp_avg_sq": self.second,
            f"{self.name}.step": self.steps,
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.rows = state[f"{self.name}.rows"].to(self.slots.device).clone()
        self.first = state[f"{self.name}.exp_avg"].to(self.first).clone()
        self.second = state[f"{self.name}.exp_avg_sq"].to(self.second).clone()
        self.steps.copy_(state[f"{self.name}.step"])
        self.slots.fill_(-1)
        self.slots[self.rows] = torch.arange(len(self.rows), device=self.slots.device)
        self.pending = 1.0


def _is_hidden(name: str, parameter: nn.Parameter) -> bool:
    """Whether it is a matrix inside a layer of the trunk."""
    return parameter.dim() == 2 and ".layers." in name


def _shares(model: nn.Module, names: Iterable[str], decay: float) -> dict[str, float]:
    """The share of the learning rate that each parameter gets."""
    if decay == 1.0:
        return dict.fromkeys(names, 1.0)
    assert isinstance(model, Model), "only a model knows how high its parameters stand"
    depths, top = model.depths(), 1 + len(model.trunk.blocks)
    shares = {name: decay ** (top - depths[name]) for name in names}
    if len(set(shares.values())) < 2:
        hint = "train layers too, or leave it out"
        raise UserError("all that is trained stands at one height", where="train.layer_decay", hint=hint)
    return shares


class Optimizer:
    """The update of a whole model: matrices decayed, vectors not.

    `adamw` updates embeddings with sparse gradients row by row. `muon` updates the matrices inside the trunk's layers,
    and AdamW the rest. `sgd` and `adafactor` update everything, tables densely.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        """Prepare for what is trained now. With a `layer_decay` the model must know the `depths` of its parameters.

        Raises:
            UserError: nothing that is trained stands at different heights, so that `layer_decay` would do nothing.
        """
        self.rule = AdamW(config.beta1, config.beta2, config.epsilon)
        self.max_grad_norm = config.max_grad_norm
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        tables = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, Embedding) and m.sparse}
        if config.optimizer == "muon" and not any(map(_is_hidden, trained, trained.values())):
            hint = "choose adamw, or train the trunk's layers"
            raise UserError("no matrix of a layer is trained", where="train.optimizer", hint=hint)
        self.sparse: list[RowSparse] = []
        self.dense: list[DenseGroup | TorchGroup] = []
        self._made_dense: list[Embedding] = []
        share = _shares(model, trained, config.layer_decay)
        self.shares = sorted(set(share.values()))
        """The shares of the learning rate that parameters get, from the lowest on."""
        self._share_of: dict[int, float] = {}
        for one in self.shares:
            groups = self._groups({n: p for n, p in trained.items() if share[n] == one}, tables, config)
            self._share_of |= {id(group): one for group in groups}

    def _groups(
        self, rest: dict[str, nn.Parameter], tables: Mapping[str, Embedding], config: TrainConfig
    ) -> list[DenseGroup | TorchGroup | RowSparse]:
        """Add what updates these parameters."""
        decay = config.weight_decay
        dense: list[DenseGroup | TorchGroup] = []
        sparse: list[RowSparse] = []
        if config.optimizer in ("sgd", "adafactor"):
            for name in rest.keys() & tables.keys():
                tables[name].sparse = False
                self._made_dense.append(tables[name])
            make = adafactor if config.optimizer == "adafactor" else sgd(config.momentum)
            dense.append(TorchGroup(rest, decay, make))
        else:
            if config.optimizer == "muon" and (hidden := {n: p for n, p in rest.items() if _is_hidden(n, p)}):
                dense.append(TorchGroup(hidden, decay, muon(config.momentum)))
                rest = {n: p for n, p in rest.items() if n not in hidden}
            sparse = [RowSparse(name, table, decay) for name, table in tables.items() if name in rest]
            rest = {name: p for name, p in rest.items() if name not in tables}
            dense.append(DenseGroup({n: p for n, p in rest.items() if p.dim() > 1}, decay))
            dense.append(DenseGroup({n: p for n, p in rest.items() if p.dim() <= 1}, 0.0))
        self.dense += dense
        self.sparse += sparse
        return [*dense, *sparse]

    @torch.no_grad()
    def step(self, learning_rate: float, loss_scale: float = 1.0) -> float:
        """Clip, update, and forget the gradients. Where they are not finite, nothing is updated.

        Args:
            loss_scale: what the loss was multiplied by before the backward pass.

        Returns:
            The global gradient norm before clipping.
        """
        grads = [grad for group in self.dense for grad in group.gradients()]
        grads += [grad for table in self.sparse if (grad := table.gradient()) is not None]
        norm = torch.nn.utils.get_total_norm(grads) / loss_scale
        if not torch.isfinite(norm):
            self.zero_grad()
            return float(norm)
        scale = ((norm + 1e-6) / self.max_grad_norm).clamp(min=1.0).float() if self.max_grad_norm else None
        if loss_scale != 1.0:
            scale = norm.new_full((), loss_scale, dtype=torch.float32) * (1.0 if scale is None else scale)
        for group in (*self.dense, *self.sparse):
            rate = learning_rate * self._share_of[id(group)]
            if isinstance(group, TorchGroup):
                group.step(rate, scale)
            else:
                group.step(self.rule, rate, scale)
        self.zero_grad()
        return float(norm)

    def effect(self) -> dict[str, float]:
        """How many weights each rule has updated."""
        found: dict[str, float] = {}
        for group in (*self.dense, *self.sparse):
            rule = type(group.inner).__name__.lower() if isinstance(group, TorchGroup) else "adamw"
            found[f"{rule}_weights"] = found.get(f"{rule}_weights", 0.0) + group.updated()
        return {name: count for name, count in found.items() if count}

    def zero_grad(self) -> None:
        for group in self.dense:
            for p in group.params.values():
                p.grad = None
        for table in self.sparse:
            table.table.weight.grad = None

    def settle(self) -> None:
        """Bring every weight to the value dense AdamW would show now. Call before reading weights directly."""
        for table in self.sparse:
            table.settle()

    def close(self) -> None:
        """Settle and take the hooks off the model."""
        for table in self.sparse:
            table.close()
        for table in self._made_dense:
            table.sparse = True

    def state(self) -> dict[str, Tensor]:
        """Every tensor of the optimiser by global name; torch's optimisers have theirs from their first step on."""
        return {name: t for group in (*self.dense, *self.sparse) for name, t in group.state().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        for group in (*self.dense, *self.sparse):
            group.load(state)
