"""What `peft` wrote with methods other than LoRA, put into a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lexmill.adapt.methods import own_attentions
from lexmill.errors import UserError
from lexmill.models import Model, Transformer
from lexmill.nn.front import Prefix, Prompt

GUARD = 1e-5
"""What `peft` adds to the rank that it divides AdaLoRA's scale by."""


def as_lora(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An AdaLoRA adapter of `peft` as a LoRA one of several ranks, the singular values inside one of its matrices."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match name.rpartition("."):
            case (layer, _, "lora_A") if len(tensor):
                found[f"{layer}.lora_A.weight"] = tensor * tensors[f"{layer}.lora_E"]
            case (layer, _, "lora_B") if tensor.shape[1]:
                found[f"{layer}.lora_B.weight"] = tensor
            case (_, _, "lora_A" | "lora_B" | "lora_E" | "ranknum"):
                pass
            case _:
                found[name] = tensor
    scale = float(config["lora_alpha"]) / (int(config["init_r"]) + GUARD)
    return {**config, "peft_type": "LORA", "r": 1, "lora_alpha": scale, "rank_pattern": None}, found


def load_prompts(model: Model, config: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> None:
    """Put the prefix or the prompt of such files in front, in place of the model's own.

    Raises:
        UserError: files that do not fit the model, or of a prefix that a network makes.
    """
    rows = tensors.get("prompt_embeddings")
    if rows is None or rows.dim() != 2:
        raise UserError("there is no 'prompt_embeddings'", where=where)
    if config.get("prefix_projection") or config.get("num_transformer_submodules") not in (None, 1):
        raise UserError("only a plain prefix or prompt of one trunk can be represented", where=where)
    misfit = UserError("the rows do not fit the model", where=where, hint="name the model that it was trained on")
    if not isinstance(model.trunk, Transformer):
        raise misfit
    if config["peft_type"] == "PROMPT_TUNING":
        prompt = Prompt(*rows.shape).to(model.device, model.dtype)
        if rows.shape[1] != model.trunk.embeddings.token.embedding_dim:
            raise misfit
        with torch.no_grad():
            prompt.weight.copy_(rows)
        model.trunk.embeddings.prompt = prompt
        return
    attentions = own_attentions(model)
    shapes = [(attention.key.out_features // attention.head_dim, attention.head_dim) for attention in attentions]
    if len(set(shapes)) > 1 or rows.shape[1] != 2 * len(attentions) * shapes[0][0] * shapes[0][1]:
        raise misfit
    parts = rows.view(len(rows), len(attentions), 2, *shapes[0])
    for index, attention in enumerate(attentions):
        prefix = Prefix(len(rows), *shapes[0]).to(model.device, model.dtype)
        with torch.no_grad():
            prefix.key.copy_(parts[:, index, 0])
            prefix.value.copy_(parts[:, index, 1])
        attention.prefix = prefix
