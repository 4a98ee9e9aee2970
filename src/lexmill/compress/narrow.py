"""Students cut out of a transformer: some of its layers, the widest-acting part of its width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lexmill import models
from lexmill.compress.units import axes_of, most, rows_of
from lexmill.engine import Loaded
from lexmill.errors import UserError
from lexmill.models import Model, ModelConfig, Transformer
from lexmill.models.backbone import Block
from lexmill.models.config import LayerOverride
from lexmill.nn.addition import additions

Choose = Literal["spaced", "first", "last"]


@dataclass(frozen=True)
class Width:
    """Sizes that a student's layers shall have; None for those of its teacher."""

    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_heads: int | None = None

    @property
    def asked(self) -> bool:
        return any(getattr(self, one.name) is not None for one in fields(self))


def plain_transformer(model: Model, where: str) -> Transformer:
    """The trunk, where its layers can be cut out. A `UserError` at `where` where they cannot."""
    trunk = model.trunk
    if not isinstance(trunk, Transformer) or trunk.sides > 1:
        raise UserError(f"the layers of '{model.family}' cannot be cut", where=where, hint="give another family")
    if trunk.config.num_groups is not None:
        raise UserError("layers that share their weights take no room to cut", where=where, hint="give another family")
    if found := next(additions(trunk), None):
        raise UserError(f"the model is changed at '{found[0]}'", where=where, hint="do this before it is")
    return trunk


def chosen_layers(layers: int, count: int, choose: Choose) -> list[int]:
    """Which of a teacher's layers a student of `count` keeps; evenly spaced ones begin with the first and end with the
    last, as far as there are two."""
    match choose:
        case "first":
            return list(range(count))
        case "last":
            return list(range(layers - count, layers))
        case "spaced":
            return [round(i * (layers - 1) / max(count - 1, 1)) for i in range(count)]


def keep_layers(model: Model, kept: Sequence[int]) -> None:
    """Take all other layers out."""
    trunk = plain_transformer(model, "layers")
    config = trunk.config
    if not config.first_norm and kept[0] != 0:
        hint = "keep the first layer, which has no norm of its own"
        raise UserError("another layer cannot be the first of this family", where="choose", hint=hint)
    overrides = tuple(config.layers[index] for index in kept) if config.layers else ()
    trunk.layers = nn.ModuleList(trunk.layers[index] for index in kept)
    trunk.config = replace(config, num_layers=len(kept), layers=overrides)


def overrides_of(config: ModelConfig) -> Sequence[LayerOverride]:
    """One a layer, also where the config has none."""
    return config.layers or (LayerOverride(),) * config.num_layers


def narrowed(config: ModelConfig, width: Width) -> ModelConfig:
    """The structure with these sizes. Heads keep theirs: where only the hidden size is given, and heads fill it, their
    number goes with it. A `UserError` where a size is not the teacher's or smaller, or sizes do not fit."""
    filled = config.num_heads * config.head_dim == config.hidden_size
    hidden = width.hidden_size or config.hidden_size
    heads = width.num_heads or (hidden // config.head_dim if filled else config.num_heads)
    sizes = {"hidden_size": hidden, "intermediate_size": width.intermediate_size or config.intermediate_size}
    sizes["num_heads"] = heads
    for name, size in sizes.items():
        if not 0 < size <= getattr(config, name):
            raise UserError(f"is {size}, and the teacher has {getattr(config, name)}", where=name)
    if filled and heads * config.head_dim != hidden:
        hint = f"heads are {config.head_dim} wide: give a multiple of that, and as many heads"
        raise UserError(f"{heads} heads do not fill a width of {hidden}", where="hidden_size", hint=hint)
    if heads != config.num_heads and config.num_kv_heads != config.num_heads:
        raise UserError("heads that share their keys cannot be cut", where="num_heads", hint="leave it out")
    if any(own.num_heads or own.num_kv_heads or own.intermediate_size for own in config.layers):
        raise UserError("the layers have sizes of their own", where="hidden_size", hint="distil before pruning")
    kv_heads = heads if config.num_kv_heads == config.num_heads else config.num_kv_heads
    return replace(config, **sizes, num_kv_heads=kv_heads)


def narrow(subject: Loaded, width: Width, *, seed: int, cut: bool) -> Model:
    """A model of the subject's kind with these sizes, the subject's heads and new weights.

    Args:
        cut: take the weights out of the subject's that act most: of the hidden width, the units that layers write most
            to; of heads and neurons, those with the largest product of what they read by and write by.
    """
    old = plain_transformer(subject.model, "hidden_size")
    config = narrowed(old.config, width)
    model = _empty(subject, config, seed)
    if cut:
        hidden = most(_written(old), config.hidden_size)
        _cut(subject.model, model, hidden, [_inner(cast("Block", block), config) for block in old.layers])
    return model.eval()


def slimmed(config: ModelConfig, size: int) -> ModelConfig:
    """The structure with hidden states of this size. The layers keep their heads, as overrides of their own where heads
    fill the hidden state, since configs of families where they must cannot say otherwise."""
    if config.num_heads * config.head_dim != config.hidden_size:
        return replace(config, hidden_size=size)
    heads = size // config.head_dim
    shapes = (config.layer(index) for index in range(config.num_layers))
    layers = tuple(
        replace(own, num_heads=shape.num_heads, num_kv_heads=shape.num_kv_heads)
        for own, shape in zip(overrides_of(config), shapes, strict=True)
    )
    kv_heads = heads if config.num_kv_heads == config.num_heads else config.num_kv_heads
    return replace(config, hidden_size=size, num_heads=heads, num_kv_heads=kv_heads, layers=layers)


def slim(subject: Loaded, hidden: Int[Tensor, "kept"]) -> Model:
    """The subject's model with these units of the hidden state alone, in a new model; see `slimmed`."""
    old = plain_transformer(subject.model, "hidden_size")
    model = _empty(subject, slimmed(old.config, len(hidden)), 0)
    _cut(subject.model, model, hidden, [{}] * len(old.layers))
    return model.eval()


def _empty(subject: Loaded, config: ModelConfig, seed: int) -> Model:
    """A model of the subject's kind and heads with new weights."""
    source = subject.model
    model = models.init(config, source.family, seed).to(source.device, source.dtype)
    model.origin.config = dict(source.origin.config)
    torch.manual_seed(seed)
    subject.task.attach(model)
    return model


@torch.no_grad()
def _cut(
    source: Model, target: Model, hidden: Int[Tensor, "kept"], inner: Sequence[Mapping[str, Int[Tensor, "kept"]]]
) -> None:
    """Fill the target with the source's weights: those of these units of the hidden state and, by layer, of what is
    inside."""
    kept = {f"trunk.layers.{index}.": own for index, own in enumerate(inner)}
    given = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        tensor = given[name]
        axes = {"hidden": hidden, **next((own for start, own in kept.items() if name.startswith(start)), {})}
        for axis, over in enumerate(axes_of(name)):
            if over in axes and tensor.shape[axis] != parameter.shape[axis]:
                tensor = tensor.index_select(axis, axes[over])
        parameter.copy_(tensor)


def _written(trunk: Transformer) -> Float[Tensor, "dim"]:
    """How much layers write to each unit of the hidden state."""
    blocks = [cast("Block", block) for block in trunk.layers]
    parts = [weight for block in blocks for weight in (block.attention.output.weight, block.mlp.down.weight)]
    return torch.stack([weight.square().sum(1) for weight in parts]).sum(0)


def _inner(block: Block, config: ModelConfig) -> dict[str, Int[Tensor, "kept"]]:
    """The rows of heads and neurons that stay in a layer."""
    attention, mlp, dim = block.attention, block.mlp, config.head_dim
    read, write = mlp.up.weight.norm(dim=1), mlp.down.weight.norm(dim=0)
    found = {"width": most(read * write, config.intermediate_size)}
    if attention.value.out_features == attention.query.out_features:
        values = attention.value.weight.reshape(-1, dim, attention.value.in_features)
        outputs = attention.output.weight.t().reshape(-1, dim, attention.output.out_features)
        heads = most(values.flatten(1).norm(dim=1) * outputs.flatten(1).norm(dim=1), config.num_heads)
        found["heads"] = found["kv_heads"] = rows_of(heads, dim)
    return found
