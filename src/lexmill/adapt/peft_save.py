"""Methods other than LoRA as files in the format of the library `peft`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lexmill.adapt.adalora import RankAllocator
from lexmill.adapt.methods import Adapted, own_attentions
from lexmill.adapt.peft import BASE, CONFIG, PROMPTS_ROOT, ROOT, TASKS, WEIGHTS
from lexmill.adapt.peft import save_adapter as save_lora
from lexmill.adapt.peft_load import GUARD
from lexmill.errors import UserError
from lexmill.models import Model, Transformer, head_tensors, module_names, trunk_prefix


def save_adapted(adapted: Adapted, directory: Path, base: str) -> None:
    """Write what the method added, and the heads, into an existing directory. Ask before `merge`.

    `peft` loads it onto the model `base`, heads included where they have the form of the family's Hugging Face class.

    Raises:
        UserError: `peft` has no format for it; it then stays in the model alone.
    """
    match adapted.config.method:
        case "lora":
            save_lora(adapted.model, directory, base)
        case "adalora":
            assert adapted.companion is not None
            _save_adalora(adapted.model, adapted.companion, directory, base)
        case "prefix":
            _save_prefix(adapted.model, directory, base)
        case "prompt":
            _save_prompt(adapted.model, directory, base)
        case method:
            raise UserError(f"peft has no format for the method '{method}'", where=str(directory))


def _write(
    model: Model, directory: Path, base: str, root: str, config: dict[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    kind, heads = head_tensors(model)
    shared = {
        "task_type": TASKS.get(kind or ""),
        BASE: base,
        "modules_to_save": sorted({theirs.rpartition(".")[0] for theirs in heads}) or None,
        "inference_mode": True,
    }
    (directory / CONFIG).write_text(json.dumps(shared | config, indent=2) + "\n", "utf-8")
    stored = {**tensors, **{root + theirs: tensor for theirs, tensor in heads.items()}}
    on_cpu = {theirs: tensor.detach().cpu().contiguous() for theirs, tensor in stored.items()}
    save_file(on_cpu, directory / WEIGHTS, metadata={"format": "pt"})


# --- AdaLoRA ----------------------------------------------------------------------------------------------------
def _save_adalora(model: Model, ranks: RankAllocator, directory: Path, base: str) -> None:
    placed, prefix = module_names(model), trunk_prefix(model)
    tensors: dict[str, Tensor] = {}
    pattern: dict[str, list[bool]] = {}
    for ours, adapter in ranks.adapters.items():
        if ours not in placed:
            raise UserError(f"peft's format cannot say what was added to '{ours}' of this family", where=str(directory))
        kept, theirs = adapter.values.detach() != 0, prefix + placed[ours]
        pattern[f"{theirs}.lora_E"] = kept.tolist()
        tensors[f"{ROOT}{theirs}.lora_A"] = adapter.q[kept]
        tensors[f"{ROOT}{theirs}.lora_B"] = adapter.p[:, kept]
        tensors[f"{ROOT}{theirs}.lora_E"] = adapter.values[kept, None]
    asked = ranks.config
    config = {
        "peft_type": "ADALORA",
        "init_r": asked.start_rank,
        "target_r": asked.rank,
        "lora_alpha": asked.alpha / asked.start_rank * (asked.start_rank + GUARD),
        "lora_dropout": asked.dropout,
        "beta1": asked.beta1,
        "beta2": asked.beta2,
        "orth_reg_weight": asked.orthogonality,
        "total_step": 1,
        "target_modules": [name.removesuffix(".lora_E") for name in pattern],
        "rank_pattern": pattern,
        "bias": "none",
        "fan_in_fan_out": False,
    }
    _write(model, directory, base, ROOT, config, tensors)


# --- prefix and prompt ------------------------------------------------------------------------------------------


def _save_prefix(model: Model, directory: Path, base: str) -> None:
    attentions = own_attentions(model)
    prefixes = [attention.prefix for attention in attentions if attention.prefix is not None]
    if len(prefixes) < len(attentions) or len({tuple(one.key.shape) for one in prefixes}) > 1:
        raise UserError("peft's format wants an equal prefix in each layer", where=str(directory))
    count, heads, dim = prefixes[0].key.shape
    rows = torch.stack([tensor for one in prefixes for tensor in (one.key, one.value)], 1)
    config = {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": count,
        "token_dim": heads * dim,
        "num_transformer_submodules": 1,
        "num_attention_heads": heads,
        "num_layers": len(prefixes),
        "encoder_hidden_size": heads * dim,
        "prefix_projection": False,
    }
    _write(model, directory, base, PROMPTS_ROOT, config, {"prompt_embeddings": rows.reshape(count, -1)})


def _save_prompt(model: Model, directory: Path, base: str) -> None:
    assert isinstance(model.trunk, Transformer)
    prompt = model.trunk.embeddings.prompt
    assert prompt is not None
    config = {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": len(prompt),
        "token_dim": prompt.weight.shape[1],
        "num_transformer_submodules": 1,
        "num_attention_heads": model.trunk.config.num_heads,
        "num_layers": model.config.num_layers,
        "prompt_tuning_init": "RANDOM",
    }
    _write(model, directory, base, PROMPTS_ROOT, config, {"prompt_embeddings": prompt.weight})
