"""The methods of adapting: each marks what is trained, by module surgery where it adds something."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from lexmill.adapt.config import AdaptConfig
from lexmill.errors import UserError
from lexmill.models import Model
from lexmill.nn.linear import Linear
from lexmill.nn.lora import LoraLinear

ADAPTER = "default"


@dataclass(frozen=True)
class Adapted:
    """A model whose parameters that are not trained have `requires_grad` False.

    Args:
        trained, total: numbers of weights.
        before: copies of small trained parameters of the trunk, to show that they moved.
    """

    model: Model
    config: AdaptConfig
    trained: int
    total: int
    before: dict[str, Tensor]

    def moved(self) -> float:
        """The share of the trunk's trained tensors that differ from how they began; 1.0 where there are none."""
        now = dict(self.model.named_parameters())
        changed = [not bool((now[name] == old).all()) for name, old in self.before.items()]
        return sum(changed) / len(changed) if changed else 1.0

    def merge(self) -> None:
        """Add what was put beside the model's matrices to them, and train everything again."""
        for parent, name, layer in list(linears(self.model)):
            if isinstance(layer, LoraLinear):
                setattr(parent, name, layer.merged())
        self.model.requires_grad_(True)


def adapt(model: Model, config: AdaptConfig) -> Adapted:
    """Prepare a model for training as `config` says. Its heads must be attached.

    Raises:
        UserError: a target that the model's layers do not have, or more layers than it has.
    """
    count = len(model.trunk.layers)
    if config.layers is not None and config.layers > count:
        raise UserError(
            f"the model has {count} layers", where="adapt.layers", hint=f"give at most {count}, or leave it out"
        )
    if config.method == "full" and config.layers is None:
        return _adapted(model, config)
    model.trunk.requires_grad_(False)
    upper = list(model.trunk.layers)[count - (config.layers or count) :]
    for layer in upper:
        _METHODS[config.method](layer, config)
    model.heads.requires_grad_(True)
    if model.has_tied_output:
        # A head that shares the token embedding would train the trunk's table.
        model.trunk.embeddings.token.requires_grad_(config.method == "full")
    return _adapted(model, config)


def _adapted(model: Model, config: AdaptConfig) -> Adapted:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise UserError("nothing would be trained", where="adapt.method", hint="choose another method for this task")
    small = {n: p.detach().clone() for n, p in trained.items() if n.startswith("trunk.") and p.numel() <= 1 << 16}
    weights = sum(p.numel() for p in model.parameters())
    return Adapted(model, config, sum(p.numel() for p in trained.values()), weights, small)


def _full(layer: nn.Module, config: AdaptConfig) -> None:
    layer.requires_grad_(True)


def _frozen(layer: nn.Module, config: AdaptConfig) -> None:
    pass


def _bitfit(layer: nn.Module, config: AdaptConfig) -> None:
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            parameter.requires_grad_(True)


def _lora(layer: nn.Module, config: AdaptConfig) -> None:
    found = {name: (parent, linear) for parent, name, linear in linears(layer)}
    for target in config.targets:
        if target not in found:
            names = ", ".join(sorted(found))
            raise UserError(f"no layer is called '{target}'", where="adapt.targets", hint=f"there are: {names}")
        parent, dense = found[target]
        adapter = LoraLinear.around(dense)
        adapter.add(ADAPTER, config.rank, config.alpha / config.rank, config.dropout)
        setattr(parent, target, adapter)


_METHODS: dict[str, Callable[[nn.Module, AdaptConfig], None]] = {
    "full": _full,
    "frozen": _frozen,
    "bitfit": _bitfit,
    "lora": _lora,
}


def linears(module: nn.Module) -> Iterator[tuple[nn.Module, str, Linear]]:
    """Linear layers with the module that holds them and their name there."""
    for parent in module.modules():
        for name, child in parent.named_children():
            if isinstance(child, Linear):
                yield parent, name, child
