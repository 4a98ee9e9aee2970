"""Adapters as files in the format of the library `peft`: `adapter_config.json` and `adapter_model.safetensors`."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lexmill.adapt.methods import ADAPTER, linears
from lexmill.adapt.peft_load import as_lora, load_prompts
from lexmill.artifact import Manifest
from lexmill.errors import UserError
from lexmill.models import Model, families, head_tensors, module_names, trunk_prefix
from lexmill.nn.lora import LoraLinear, LowRank

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "base_model_name_or_path"
ROOT = "base_model.model."
PROMPTS_ROOT = "base_model."
"""What the names of head tensors begin with, where `peft` puts nothing around the model's layers."""
PROMPTS = ("PREFIX_TUNING", "PROMPT_TUNING")
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")
"""Ways to begin a low-rank adapter that leave another matrix behind than the model's files hold."""
_UNREPRESENTED = (
    *("fan_in_fan_out", "use_dora", "rank_pattern", "alpha_pattern", "layer_replication", "use_qalora"),
    *("alora_invocation_tokens", "arrow_config"),  # it acts on some tokens, or by some texts, only
)
TASKS = {"classifier": "SEQ_CLS", "token_classifier": "TOKEN_CLS", "lm": "CAUSAL_LM"}


def save_adapter(model: Model, directory: Path, base: str, name: str = ADAPTER) -> None:
    """Write the low-rank matrices called `name`, and the heads, into an existing directory.

    `peft` loads it onto the model `base`, heads included where they have the form of the family's Hugging Face class.

    Raises:
        UserError: files of this family keep an adapted matrix in a form that `peft` has no adapter for.
    """
    placed, prefix = module_names(model), trunk_prefix(model)
    tensors: dict[str, Tensor] = {}
    targets: list[str] = []
    adapters: list[LowRank] = []
    for parent, leaf, layer in linears(model.trunk):
        if not isinstance(layer, LoraLinear) or name not in layer.adapters:
            continue
        ours = next(path for path, module in model.trunk.named_modules() if module is parent)
        if f"{ours}.{leaf}" not in placed:
            raise UserError(f"peft's format cannot say what was added to '{leaf}' of this family", where=str(directory))
        adapter = layer.adapter(name)
        adapters.append(adapter)
        targets.append(prefix + placed[f"{ours}.{leaf}"])
        tensors[f"{ROOT}{targets[-1]}.lora_A.weight"] = adapter.a
        tensors[f"{ROOT}{targets[-1]}.lora_B.weight"] = adapter.b
    kind, heads = head_tensors(model)
    tensors |= {f"{ROOT}{theirs}": tensor for theirs, tensor in heads.items()}
    rank, scale = len(adapters[0].a), adapters[0].scale
    config = {
        "peft_type": "LORA",
        "task_type": TASKS.get(kind or ""),
        BASE: base,
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": adapters[0].dropout.p,
        "target_modules": targets,
        "modules_to_save": sorted({theirs.rpartition(".")[0] for theirs in heads}) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    stored = {theirs: tensor.detach().cpu().contiguous() for theirs, tensor in tensors.items()}
    save_file(stored, directory / WEIGHTS, metadata={"format": "pt"})


def load_adapter(model: Model, directory: Path, name: str = ADAPTER) -> None:
    """Add the low-rank matrices that `peft` or `save_adapter` wrote, and make them the active ones.

    AdaLoRA's matrices are loaded as LoRA's; a prefix or a prompt is put in front.

    Raises:
        UserError: files that are missing, broken, of another method, or for another model.
    """
    config, tensors = _read(directory)
    where = str(directory / WEIGHTS)
    if config["peft_type"] in PROMPTS:
        load_prompts(model, config, tensors, where)
        return
    theirs = {their: ours for ours, their in module_names(model).items()}
    prefix = families.find(model.family).prefix
    scale = float(config["lora_alpha"]) / int(config["r"]) ** (0.5 if config.get("use_rslora") else 1.0)
    found = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    _refuse_left_over(config, tensors, found, where)
    for key in sorted(found):
        ours = theirs.get(key.removeprefix(ROOT).removeprefix(prefix))
        if ours is None:
            raise UserError(f"the model has no layer '{key.removeprefix(ROOT)}'", where=where)
        path, _, leaf = ours.rpartition(".")
        parent = model.trunk.get_submodule(path)
        layer: Any = getattr(parent, leaf)
        if not isinstance(layer, LoraLinear):
            layer = LoraLinear.around(layer)
            setattr(parent, leaf, layer)
        a, b = tensors[f"{key}.lora_A.weight"], tensors.get(f"{key}.lora_B.weight")
        if b is None or a.shape[1:] != (layer.in_features,) or b.shape != (layer.out_features, len(a)):
            raise UserError(f"the matrices of '{key.removeprefix(ROOT)}' do not fit the model", where=where)
        adapter = layer.add(name, len(a), scale, float(config.get("lora_dropout", 0.0)))
        with torch.no_grad():
            adapter.a.copy_(a)
            adapter.b.copy_(b)


def refuse_rounded(manifest: Manifest, where: str) -> None:
    """Raise a `UserError` where an artefact's adapter was trained beside matrices in fewer bits: it belongs to those,
    and not to the model that the run began from."""
    for transform in manifest.history:
        adapted = transform.parameters.get("adapt") if transform.name == "fit" else None
        bits = adapted.get("base_bits") if isinstance(adapted, dict) else None
        if bits:
            hint = f"fit it without adapt.base_bits (it is {bits})"
            raise UserError(
                "its adapter was trained over rounded matrices, and goes onto no other", where=where, hint=hint
            )


def _refuse_left_over(config: dict[str, Any], tensors: dict[str, Tensor], found: set[str], where: str) -> None:
    """Raise a `UserError` for a tensor that is neither a low-rank matrix of a layer nor part of a head."""
    heads = {f"{name}." for name in config.get("modules_to_save") or ()}  # peft too looks at how a name ends
    for key in tensors.keys() - {f"{key}.{side}.weight" for key in found for side in ("lora_A", "lora_B")}:
        if not any(name in key for name in heads):
            hint = "only low-rank matrices of linear layers, without biases, and heads can be loaded"
            raise UserError(f"the tensor '{key}' has no place in the model", where=where, hint=hint)


def load_heads(model: Model, directory: Path) -> None:
    """Give a model's head the weights that stand beside an adapter.

    Raises:
        UserError: there are none, or they do not fit.
    """
    beside = _heads(directory)
    for name, own in head_tensors(model)[1].items():
        stored = beside.get(name)
        if stored is None or stored.shape != own.shape:
            raise UserError(f"the tensor '{name}' is missing, or does not fit", where=str(directory / WEIGHTS))
        with torch.no_grad():
            own.copy_(stored)


def task_of(directory: Path) -> str | None:
    """What `peft` calls the task of an adapter; None where it is for none. Raises as `settings`."""
    return settings(directory).get("task_type")


def take_heads(model: Model, directory: Path) -> set[str]:
    """Let the head weights that stand beside an adapter be those that a head of the model is made from; gives their
    names."""
    family, beside = families.find(model.family).prefix, _heads(directory)
    for name, tensor in beside.items():
        inside = name.removeprefix(family)
        model.extras[name if inside == name else model.origin.prefix + inside] = tensor
    return set(beside)


def refuse_unplaced(model: Model, taken: Collection[str], directory: Path) -> None:
    """Raise a `UserError` where weights that were taken from beside an adapter are those of no head of the model."""
    for name in sorted(set(taken) - head_tensors(model)[1].keys()):
        hint = "only heads of the family's own form can stand beside an adapter"
        raise UserError(f"the tensor '{name}' has no place in the model", where=str(directory / WEIGHTS), hint=hint)


def _heads(directory: Path) -> dict[str, Tensor]:
    """What stands beside an adapter that belongs to no layer, as the family's files name it."""
    config, tensors = _read(directory)
    root = PROMPTS_ROOT if config["peft_type"] in PROMPTS else ROOT
    added = (".lora_A.weight", ".lora_B.weight")
    return {
        name.removeprefix(root): tensor
        for name, tensor in tensors.items()
        if not name.endswith(added) and name != "prompt_embeddings"
    }


def settings(directory: Path) -> dict[str, Any]:
    """What `adapter_config.json` says. A `UserError` where it cannot be read, or a setting is not of its kind."""
    file = directory / CONFIG
    try:
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(directory, error) from error
    _refuse_odd(config, file)
    return config


def _unreadable(directory: Path, error: Exception) -> UserError:
    return UserError(f"no readable adapter: {error}", where=str(directory), hint="give peft's directory")


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = settings(directory)
    try:
        tensors = load_file(directory / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise _unreadable(directory, error) from error
    if config.get("peft_type") in PROMPTS:
        return config, tensors
    if config.get("peft_type") == "ADALORA":
        config, tensors = as_lora(config, tensors)
    for key in _UNREPRESENTED:
        if config.get(key):
            raise UserError(f"{config[key]!r} cannot be represented", where=f"{directory / CONFIG}: {key}")
    begun = str(config.get("init_lora_weights", "")).lower()
    if begun.startswith(_CHANGE_THE_BASE):
        hint = "convert it to plain LoRA with peft: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        what = f"'{begun}' takes what the adapter begins with out of the model's own matrices"
        raise UserError(what, where=f"{directory / CONFIG}: init_lora_weights", hint=hint)
    if config.get("peft_type") != "LORA" or config.get("bias", "none") != "none":
        raise UserError(
            "only LoRA without trained biases, AdaLoRA, a prefix or a prompt can be loaded",
            where=str(directory / CONFIG),
        )
    return config, tensors


def _refuse_odd(config: Any, file: Path) -> None:
    """Raise a `UserError` where what an adapter is computed by is not of its kind."""
    if not isinstance(config, dict):
        raise UserError("it holds no settings", where=str(file), hint="give peft's directory")
    kept, method = config.get("modules_to_save"), config.get("peft_type")
    if kept is not None and not (isinstance(kept, list) and all(isinstance(name, str) for name in kept)):
        raise UserError(f"{kept!r} is no list of names", where=f"{file}: modules_to_save")
    for key in {"LORA": ("r", "lora_alpha"), "ADALORA": ("init_r", "lora_alpha")}.get(str(method), ()):
        if not isinstance(config.get(key), int | float) or not config[key] > 0:
            raise UserError(f"{config.get(key)!r} is no number above 0", where=f"{file}: {key}")
