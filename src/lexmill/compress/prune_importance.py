"""How much a loss would feel the loss of a unit: gradients of gates that stand open at 1."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lexmill.compress.units import most
from lexmill.data.batch import collate
from lexmill.engine import Loaded
from lexmill.errors import UserError
from lexmill.models import Transformer
from lexmill.models.backbone import Block
from lexmill.nn.pooling import select
from lexmill.tasks import Record

Order = Literal["first", "second"]
Scope = Literal["model", "layer"]
Kind = Literal["neurons", "heads", "layers", "width"]


def blocks_of(trunk: Transformer) -> list[Block]:
    return [cast("Block", block) for block in trunk.layers]


def sizes_of(trunk: Transformer, kind: Kind) -> list[int]:
    """How many units there are: in each layer, or, where the units are layers or the hidden state's, in all. Heads that
    share their keys are one unit."""
    if kind == "layers":
        return [len(trunk.layers)]
    if kind == "width":
        return [trunk.config.hidden_size]
    if kind == "neurons":
        return [block.mlp.down.in_features for block in blocks_of(trunk)]
    return [block.attention.key.out_features // block.attention.head_dim for block in blocks_of(trunk)]


def importance(
    subject: Loaded, rows: Sequence[Record], kind: Kind, order: Order, progress: Callable[[float], None]
) -> list[Float[Tensor, "unit"]]:
    """For the units of each layer, the mean over examples of what the loss L of one would change by without it.

    With a gate z = 1 on what a unit gives, `first` is |∂L/∂z|, which is |Σ w ∂L/∂w| over the weights that the unit
    writes with (Molchanov et al. 2019, section 3; Michel et al. 2019, section 4). `second` is (∂L/∂z)², the diagonal of
    the Fisher information that stands for that of the Hessian (Kwon et al. 2022, section 4).

    Raises:
        UserError: no row has a label.
    """
    model, task = subject.model.eval(), subject.task
    trunk = cast("Transformer", model.trunk)
    examples = task.encode(rows, subject.tokenizer, labelled=True)
    seen = 0
    with _gated(trunk, kind) as gates:
        totals = [torch.zeros_like(gate, dtype=torch.float64) for gate in gates]
        for number, example in enumerate(examples, start=1):
            batch = collate([example])
            weights = task.item_weights(batch)
            if not any(one.any() for one in weights.values()):
                continue
            items = task.item_losses(task.forward(model, batch), batch)
            loss = torch.stack(
                [(items[head] * torch.as_tensor(w).to(items[head])).sum() for head, w in weights.items()]
            )
            for total, slope in zip(totals, torch.autograd.grad(loss.sum(), gates), strict=True):
                total += slope.double().abs() if order == "first" else slope.double().square()
            seen += 1
            progress(number / len(examples))
    if not seen:
        raise UserError("no row has a label to measure importance by", where="train")
    return [total / seen for total in totals]


@contextmanager
def _gated(trunk: Transformer, kind: Kind) -> Generator[list[Float[Tensor, "unit"]]]:
    """Gates of value 1 on the units of each layer, as long as this lasts."""
    like = trunk.embeddings.token.like
    gates = [
        torch.ones(size, dtype=like.dtype, device=like.device, requires_grad=True) for size in sizes_of(trunk, kind)
    ]
    handles: list[Any] = []
    if kind == "width":
        handles += [one.register_forward_hook(partial(_after_state, gates[0])) for one in _states(trunk)]
    for index, block in enumerate(blocks_of(trunk) if kind != "width" else ()):
        if kind == "layers":
            turn = partial(_around_layer, gates[0], index)
            handles.append(block.register_forward_hook(turn, with_kwargs=True))
        else:
            reader = block.mlp.down if kind == "neurons" else block.attention.output
            handles.append(reader.register_forward_pre_hook(partial(_before_matrix, gates[index])))
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()


def _states(trunk: Transformer) -> list[nn.Module]:
    """What gives hidden states in the form in which layers and heads read them."""
    read = [part for block in blocks_of(trunk) for part in (block.attention_norm, block.mlp_norm)]
    if trunk.config.norm_place == "post":
        return [trunk.embeddings, *read, *([trunk.norm] if trunk.config.final_norm else [])]
    return [*read, trunk.norm]


def _after_state(gate: Tensor, module: nn.Module, given: tuple[Any, ...], result: Tensor) -> Tensor:
    return result * gate


def _before_matrix(gate: Tensor, module: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
    return given[0] * gate.repeat_interleave(given[0].shape[-1] // len(gate))


def _around_layer(
    gate: Tensor, index: int, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], result: Tensor
) -> Tensor:
    hidden, layout = given
    before = hidden if named["only"] == "all" else select(hidden, layout, named["only"])
    return before + gate[index] * (result - before)


def counts_of(sizes: Sequence[int], keep: float, scope: Scope, step: int = 1) -> list[int]:
    """How many units this share is: of each layer, in multiples of `step`, or, over the whole `model`, of all together,
    before those of a layer are brought to a multiple."""
    if scope == "layer":
        return [_stepped(keep * size, size, step) for size in sizes]
    return [max(len(sizes), round(keep * sum(sizes)))]


def choose(
    scores: Sequence[Float[Tensor, "unit"]], keep: float, scope: Scope, step: int = 1
) -> list[Int[Tensor, "kept"]]:
    """By layer the units that stay, the most important ones, in their order; a multiple of `step` of each layer."""
    sizes = [len(one) for one in scores]
    counts = counts_of(sizes, keep, scope, step)
    if scope == "model":
        raised = [one.index_fill(0, one.argmax(), torch.inf) for one in scores]
        stays = torch.zeros(sum(sizes), dtype=torch.bool, device=scores[0].device)
        stays[most(torch.cat(raised), counts[0])] = True
        own = [int(part.sum()) for part in stays.split(sizes)]
        counts = [_stepped(count, size, step) for count, size in zip(own, sizes, strict=True)]
    return [most(one, count) for one, count in zip(scores, counts, strict=True)]


def _stepped(count: float, size: int, step: int) -> int:
    """The multiple of `step` that is nearest, one at least; no more than there are."""
    return min(size, step * max(1, round(count / step)))
