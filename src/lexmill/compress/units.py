"""What the axes of a transformer's weights run over, and taking some of it out of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

_ROWS_AND_COLUMNS = {
    "attention.query": ("heads", "hidden"),
    "attention.key": ("kv_heads", "hidden"),
    "attention.value": ("kv_heads", "hidden"),
    "attention.output": ("hidden", "heads"),
    "mlp.up": ("width", "hidden"),
    "mlp.gate": ("width", "hidden"),
    "mlp.down": ("hidden", "width"),
    "transform": ("hidden", "hidden"),
    "output": ("", "hidden"),
    "projection": ("hidden", ""),
    "token": ("", "hidden"),
    "position": ("", "hidden"),
    "segment": ("", "hidden"),
    "task_type": ("", "hidden"),
    "attention_norm": ("hidden",),
    "attention_out_norm": ("hidden",),
    "mlp_norm": ("hidden",),
    "mlp_out_norm": ("hidden",),
    "norm": ("hidden",),
}
"""By the end of a module's name, what the axes of its weight run over, where that may get narrower."""


def axes_of(name: str) -> tuple[str, ...]:
    """What the axes of the parameter of this name run over."""
    place, _, leaf = name.rpartition(".")
    ends = (end for end in _ROWS_AND_COLUMNS if place == end or place.endswith(f".{end}"))
    axes = _ROWS_AND_COLUMNS.get(max(ends, key=len, default=""), ())
    return axes[:1] if leaf == "bias" else axes


def most(scores: Float[Tensor, "unit"], count: int) -> Int[Tensor, "kept"]:
    """The units with the largest scores, in their order."""
    return scores.topk(count).indices.sort().values


def rows_of(units: Int[Tensor, "kept"], size: int) -> Int[Tensor, "row"]:
    """The rows of units that have so many each, such as heads."""
    return (units[:, None] * size + torch.arange(size, device=units.device)).reshape(-1)


@torch.no_grad()
def shrink(module: nn.Module, kept: Mapping[str, Int[Tensor, "kept"]]) -> None:
    """Leave these rows and columns alone in a module's weights, in place: by what axes run over, what stays."""
    for name, parameter in list(module.named_parameters()):
        tensor: Tensor = parameter
        for axis, over in enumerate(axes_of(name)):
            if over in kept:
                tensor = tensor.index_select(axis, kept[over])
        if tensor is not parameter:
            place, _, leaf = name.rpartition(".")
            owner = module.get_submodule(place)
            owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=parameter.requires_grad))
            if isinstance(owner, nn.Linear):
                owner.out_features, owner.in_features = owner.weight.shape


def num_weights(module: nn.Module) -> int:
    """How many there are, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())
