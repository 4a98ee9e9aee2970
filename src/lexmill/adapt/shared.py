"""Several adapters over one trunk: which of them acts, on all rows or on some."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lexmill.adapt.methods import linears
from lexmill.adapt.peft import load_adapter
from lexmill.errors import UserError
from lexmill.models import LMHead, Model, Trunk
from lexmill.models.heads import build_head
from lexmill.nn.layout import Packed
from lexmill.nn.lora import LoraLinear, RowsOf

HEADS = "heads.safetensors"


def add_adapter(base: Model, name: str, directory: Path, heads: Mapping[str, Mapping[str, object]]) -> Model:
    """Load an adapter in `peft`'s format, and its heads, beside the trunk of `base`; none acts afterwards.

    Args:
        heads: by name, described as a model's `structure` does.

    Returns:
        A model of the same trunk, whose weights stand once, with these heads.

    Raises:
        UserError: files are missing or broken, or do not fit the trunk, or are no low-rank adapter.
    """
    if base.trunk.has_prompt:
        raise UserError("a trunk with a prompt in front of its input cannot be shared", where=str(directory))
    load_adapter(base, directory, name)
    if not any(isinstance(layer, LoraLinear) and name in layer.adapters for _, _, layer in linears(base.trunk)):
        raise UserError("only low-rank adapters can share a trunk", where=str(directory))
    model = Model(base.trunk, base.family, origin=base.origin).eval()
    for head, described in heads.items():
        model.add_head(head, build_head(base.trunk, described, f"{directory}: {head}"))
    _load_heads(model, directory / HEADS)
    activate(base.trunk, None)
    return model


def adapter_tensors(adapters: Mapping[str, Model]) -> dict[str, Tensor]:
    """All that adapters and their heads hold, by name within an artefact."""
    found: dict[str, Tensor] = {}
    for name, model in adapters.items():
        for path, layer in model.trunk.named_modules():
            if isinstance(layer, LoraLinear) and name in layer.adapters:
                low_rank = layer.adapter(name)
                found |= {f"adapters/{name}/{path}.a": low_rank.a, f"adapters/{name}/{path}.b": low_rank.b}
        found |= {f"adapters/{name}/heads.{key}": tensor for key, tensor in head_state(model).items()}
    return found


def head_state(model: Model) -> dict[str, Tensor]:
    """The weights of all heads by name, without those that a head shares with the trunk."""
    found: dict[str, Tensor] = {}
    for name, head in model.heads.items():
        tied = isinstance(head, LMHead) and head.tied
        own = head.named_parameters()
        found |= {f"{name}.{key}": tensor for key, tensor in own if not (tied and key == "output.weight")}
    return found


def save_heads(model: Model, directory: Path) -> None:
    """Write the weights of all heads into an existing directory, where `add_adapter` finds them."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in head_state(model).items()}
    save_file(stored, directory / HEADS, metadata={"format": "pt"})


def _load_heads(model: Model, file: Path) -> None:
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot be read: {error}", where=str(file)) from error
    wanted = head_state(model)
    for name, tensor in wanted.items():
        if name not in stored or stored[name].shape != tensor.shape:
            raise UserError(f"the tensor '{name}' is missing or has another shape", where=str(file))
        with torch.no_grad():
            tensor.copy_(stored[name])


def activate(trunk: Trunk, choice: str | RowsOf | None) -> None:
    """Let this adapter act on all rows, each on rows of its own, or none."""
    for _, _, layer in linears(trunk):
        if isinstance(layer, LoraLinear):
            layer.active = choice if not isinstance(choice, str) or choice in layer.adapters else None


@contextmanager
def using(trunk: Trunk, choice: str | RowsOf | None) -> Generator[None]:
    """`activate` within a block; afterwards none acts."""
    activate(trunk, choice)
    try:
        yield
    finally:
        activate(trunk, None)


def rows_of(layout: Packed, owner: Int[Tensor, "tok"], names: Sequence[str | None]) -> RowsOf:
    """The rows of each adapter, in the order in which a trunk's layers see the rows of this layout.

    Args:
        owner: for each token, the place of its adapter in `names`.
    """
    order = owner if layout.grouped is None else owner[layout.grouped.rows]
    return {name: (order == index).nonzero().flatten() for index, name in enumerate(names) if name is not None}
