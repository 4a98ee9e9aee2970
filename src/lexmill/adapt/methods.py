"""The methods of adapting: each marks what is trained, by module surgery where it adds something."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lexmill.adapt.adalora import RankAllocator
from lexmill.adapt.config import AdaptConfig, Method
from lexmill.errors import UserError
from lexmill.models import Model, Transformer
from lexmill.nn.addition import additions
from lexmill.nn.attention import Attention
from lexmill.nn.blockwise import Bits
from lexmill.nn.bottleneck import Bottleneck, BottleneckLinear
from lexmill.nn.front import Prefix, Prompt
from lexmill.nn.layout import Packed
from lexmill.nn.linear import Linear
from lexmill.nn.lora import LoraLinear
from lexmill.nn.svd import SvdLinear

ADAPTER = "default"


@dataclass(frozen=True)
class Adapted:
    """A model whose parameters that are not trained have `requires_grad` False.

    Args:
        trained, total: numbers of weights.
        before: copies of small trained parameters of the trunk, to show that they moved.
        companion: takes part in each step of training, where the method does.
        stored: bytes of the trunk's matrices before and after storing them in fewer bits; None where that was not done.
    """

    model: Model
    config: AdaptConfig
    trained: int
    total: int
    before: dict[str, Tensor]
    companion: RankAllocator | None = None
    stored: tuple[int, int] | None = None

    def moved(self) -> float:
        """The share of the trunk's trained tensors that differ from how they began; 1.0 where there are none."""
        now = dict(self.model.named_parameters())
        changed = [not bool((now[name] == old).all()) for name, old in self.before.items()]
        return sum(changed) / len(changed) if changed else 1.0

    @property
    def added(self) -> bool:
        """Whether the method put something beside the model's own weights."""
        return self.config.method not in ("full", "frozen", "bitfit")

    def effect(self) -> dict[str, float]:
        """What adapting did, for the record. Ask before `merge`."""
        effect = {"trained_weights": float(self.trained), "weights": float(self.total)}
        if self.before:
            effect["trunk_moved"] = self.moved()
        if self.stored is not None:
            effect |= {"trunk_bytes_before": float(self.stored[0]), "trunk_bytes": float(self.stored[1])}
        return effect if self.companion is None else effect | self.companion.effect()

    def merge(self) -> None:
        """Add what was put beside the model's matrices to them, make them whole, and train everything again.

        What cannot be added to a matrix (bottlenecks, a prefix, a prompt) stays beside them.
        """
        merge(self.model)
        self.model.requires_grad_(True)


@dataclass(frozen=True)
class _Surgery:
    """What a method is given: the model, the layers it may change by number, and the config."""

    model: Model
    layers: dict[int, nn.Module]
    config: AdaptConfig = field(default_factory=AdaptConfig)


def merge(model: Model) -> int:
    """Make a model's matrices whole, the active low-rank ones added to them; gives how many of these there were."""
    count = 0
    for parent, name, layer in list(linears(model)):
        if isinstance(layer, LoraLinear | SvdLinear):
            setattr(parent, name, layer.merged())
            count += 1
        else:
            layer.whole()
    return count


def adapt(model: Model, config: AdaptConfig) -> Adapted:
    """Prepare a model for training as `config` says. Its heads must be attached.

    Raises:
        UserError: a target that the model's layers do not have, more layers than it has, layers that share their
            weights with others, or a method that has nothing to do in this model.
    """
    config.check()
    layers = _chosen(model.trunk.blocks, config.layers)
    if config.method == "full" and config.layers is None:
        if config.base_bits is not None:
            hint = "choose lora, or another method that leaves the matrices as they are"
            raise UserError(
                "every matrix is trained: none can be stored in fewer bits", where="adapt.base_bits", hint=hint
            )
        return _adapted(model, config)
    model.trunk.requires_grad_(False)
    _METHODS[config.method](_Surgery(model, layers, config))
    model.heads.requires_grad_(True)
    if model.has_tied_output:
        # A head that shares the token embedding would train the trunk's table.
        model.trunk.embeddings.token.requires_grad_(False)
    return _adapted(model, config)


def _chosen(layers: Sequence[nn.Module], wanted: int | Sequence[int] | None) -> dict[int, nn.Module]:
    """The layers wanted, by number; those that are the same module once, by the lowest."""
    numbers = _numbers(len(layers), wanted)
    chosen = {layers[number]: number for number in reversed(numbers)}
    shared = [number for number, layer in enumerate(layers) if layer in chosen and number not in numbers]
    if shared:
        hint = "give layers that share weights together, or leave it out"
        raise UserError(f"layer {shared[0]} shares its weights with a chosen one", where="adapt.layers", hint=hint)
    return {number: layer for layer, number in reversed(chosen.items())}


def _numbers(count: int, layers: int | Sequence[int] | None) -> list[int]:
    if layers is None:
        return list(range(count))
    if isinstance(layers, int):
        if layers > count:
            raise UserError(
                f"the model has {count} layers", where="adapt.layers", hint=f"give at most {count}, or leave it out"
            )
        return list(range(count - layers, count))
    if not layers or len(set(layers)) < len(layers) or max(layers) >= count:
        hint = f"give numbers from 0 to {count - 1}, each once"
        raise UserError(f"the model has {count} layers", where="adapt.layers", hint=hint)
    return sorted(layers)


def _adapted(model: Model, config: AdaptConfig) -> Adapted:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise UserError("nothing would be trained", where="adapt.method", hint="choose another method for this task")
    small = {n: p.detach().clone() for n, p in trained.items() if n.startswith("trunk.") and p.numel() <= 1 << 16}
    weights = sum(p.numel() for p in model.parameters())
    companion = RankAllocator(model.trunk, config) if config.method == "adalora" else None
    stored = None if config.base_bits is None else _store(model, config.base_bits, double=config.double_quant)
    return Adapted(model, config, sum(p.numel() for p in trained.values()), weights, small, companion, stored)


def _store(model: Model, bits: Bits, *, double: bool) -> tuple[int, int]:
    """Store the matrices of the layers that are not trained in fewer bits; gives the bytes of all before and after."""
    found = [
        layer
        for block in dict.fromkeys(model.trunk.blocks)
        for _, _, layer in linears(block)
        if layer.in_features * layer.out_features
    ]
    before = sum(layer.weight.numel() * layer.weight.element_size() for layer in found)
    for layer in found:
        if not layer.weight.requires_grad:
            layer.quantise(bits, double=double)
    after = sum(
        layer.weight.numel() * layer.weight.element_size() if layer.quantised is None else layer.quantised.num_bytes()
        for layer in found
    )
    if after == before:
        hint = "leave it out, or choose a method or layers that leave matrices as they are"
        raise UserError("no matrix of a layer stays as it is", where="adapt.base_bits", hint=hint)
    return before, after


# --- the methods ------------------------------------------------------------------------------------------------
def _full(on: _Surgery) -> None:
    for layer in on.layers.values():
        layer.requires_grad_(True)


def _frozen(on: _Surgery) -> None:
    if on.config.layers is not None:
        raise UserError("with this method no layer is trained", where="adapt.layers", hint="leave it out")


def _bitfit(on: _Surgery) -> None:
    for layer in on.layers.values():
        for name, parameter in layer.named_parameters():
            if name.endswith("bias"):
                parameter.requires_grad_(True)


def _lora(on: _Surgery) -> None:
    config = on.config
    for parent, name, dense in _targets(on):
        adapter = LoraLinear.around(dense)
        adapter.add(ADAPTER, config.rank, config.alpha / config.rank, config.dropout)
        setattr(parent, name, adapter)


def _adalora(on: _Surgery) -> None:
    config = on.config
    for parent, name, dense in _targets(on):
        setattr(
            parent, name, SvdLinear.around(dense, config.start_rank, config.alpha / config.start_rank, config.dropout)
        )


def _bottleneck(on: _Surgery) -> None:
    for layer in on.layers.values():
        for parent, name, dense in _named(layer, ("output", "down")):
            setattr(parent, name, BottleneckLinear.around(dense, on.config.width))


def _transformer(on: _Surgery) -> Transformer:
    trunk = on.model.trunk
    if not isinstance(trunk, Transformer) or len(trunk.blocks) > len(trunk.layers):
        needed = f"the method '{on.config.method}' needs one transformer, an encoder or a decoder"
        raise UserError(needed, where="adapt.method", hint="adapt it in another way, such as lora")
    return trunk


def _prefix(on: _Surgery) -> None:
    count, trunk = on.config.tokens, _transformer(on)
    own_attentions(on.model)
    _refuse_no_room(on.model, count)
    if trunk.relative is not None:
        hint = "adapt it in another way, such as lora"
        raise UserError("a model with a bias by position cannot have a prefix", where="adapt.method", hint=hint)
    if any(isinstance(one, Prefix) for _, one in additions(trunk)):
        raise UserError("the model has a prefix already", where="adapt.method", hint="train it with another method")
    seen: list[dict[str, Tensor]] = []
    training = trunk.training
    with torch.no_grad():
        trunk.eval()
        ids = torch.randint(trunk.embeddings.token.num_embeddings, (count,)).to(on.model.device)
        positions = torch.arange(count, device=ids.device)
        trunk(ids, positions, Packed.of([count], on.model.device), collect=seen)
        trunk.train(training)
    for index, layer in on.layers.items():
        attention = own_attention(layer)
        # What the layer makes of a few random tokens: their keys and values are of the kind that it knows.
        key, value = seen[index + 1]["key"][-count:], seen[index + 1]["value"][-count:]
        prefix = Prefix(count, key.shape[1], key.shape[2]).to(key.device, key.dtype)
        with torch.no_grad():
            prefix.key.copy_(key)
            prefix.value.copy_(value)
        attention.prefix = prefix


def _prompt(on: _Surgery) -> None:
    embeddings = _transformer(on).embeddings
    if on.config.layers is not None:
        raise UserError("a prompt is in front of the input, in no layer", where="adapt.layers", hint="leave it out")
    if embeddings.prompt is not None:
        raise UserError("the model has a prompt already", where="adapt.method", hint="train it with another method")
    _refuse_no_room(on.model, on.config.tokens)
    table = embeddings.token.weight
    ids = torch.randint(len(table), (on.config.tokens,)).to(table.device)
    prompt = Prompt(len(ids), table.shape[1]).to(table.device, table.dtype)
    with torch.no_grad():
        prompt.weight.copy_(table[ids])
    embeddings.prompt = prompt


_METHODS: dict[Method, Callable[[_Surgery], None]] = {
    "full": _full,
    "frozen": _frozen,
    "bitfit": _bitfit,
    "lora": _lora,
    "adalora": _adalora,
    "bottleneck": _bottleneck,
    "prefix": _prefix,
    "prompt": _prompt,
}


def _refuse_no_room(model: Model, count: int) -> None:
    if count >= model.trunk.max_tokens:
        hint = f"the model has room for {model.trunk.max_tokens} tokens"
        raise UserError("nothing of a text has room beside it", where="adapt.tokens", hint=hint)


def _targets(on: _Surgery) -> Iterator[tuple[nn.Module, str, Linear]]:
    for layer in on.layers.values():
        yield from _named(layer, on.config.targets)


def _named(layer: nn.Module, names: Sequence[str]) -> Iterator[tuple[nn.Module, str, Linear]]:
    """The plain linear layers of these names, with the module that holds each."""
    found: dict[str, list[tuple[nn.Module, Linear]]] = {}
    for parent, name, linear in linears(layer):
        if not isinstance(parent, Bottleneck):
            found.setdefault(name, []).append((parent, linear))
    for name in names:
        if name not in found:
            known = ", ".join(sorted(found))
            raise UserError(f"no layer is called '{name}'", where="adapt.targets", hint=f"there are: {known}")
        for parent, linear in found[name]:
            if type(linear) is not Linear:
                hint = "choose other targets, or another method"
                raise UserError(f"'{name}' has a {linear.kind} already", where="adapt.method", hint=hint)
            yield parent, name, linear


def own_attention(layer: nn.Module) -> Attention:
    """The attention of a layer to its own input."""
    found = next((module for module in layer.modules() if isinstance(module, Attention)), None)
    if found is None:
        raise UserError("a layer without attention cannot have a prefix", where="adapt.method")
    return found


def own_attentions(model: Model) -> list[Attention]:
    """Those of all layers of the trunk. A `UserError` where layers share one."""
    found = [own_attention(layer) for layer in model.trunk.layers]
    if len(set(found)) < len(found):
        hint = "choose another method, such as lora"
        raise UserError("layers that share weights cannot have a prefix each", where="adapt.method", hint=hint)
    return found


def linears(module: nn.Module) -> Iterator[tuple[nn.Module, str, Linear]]:
    """Linear layers with the module that holds them and their name there."""
    for parent in module.modules():
        for name, child in parent.named_children():
            if isinstance(child, Linear):
                yield parent, name, child
