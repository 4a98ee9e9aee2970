"""Architectures of GGUF as tables: what their settings and tensors are called in a Hugging Face directory.

After the GGUF specification ("Standardized key-value pairs", "Standardized tensor names"; ggml, 2023).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from lexmill.artifact.gguf.source import Source
from lexmill.errors import UserError

_SETTINGS: dict[str, tuple[str, type]] = {
    "embedding_length": ("hidden_size", int),
    "block_count": ("num_hidden_layers", int),
    "feed_forward_length": ("intermediate_size", int),
    "attention.head_count": ("num_attention_heads", int),
    "context_length": ("max_position_embeddings", int),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", float),
}
_ELSEWHERE = {
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count",
    "rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "vocab_size",
}  # fmt: skip
"""Settings that `config` reads too, each with its own meaning where it is absent."""
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_QKV_BIAS = {f"attn_{part}.bias": f"self_attn.{part}_proj.bias" for part in "qkv"}
_QK_NORM = {f"attn_{part}_norm.weight": f"self_attn.{part}_norm.weight" for part in "qk"}


@dataclass(frozen=True)
class Architecture:
    """One `general.architecture`.

    Args:
        model_type, causal_lm: what Hugging Face calls it and its class.
        layer: names of a layer's tensors here and there.
        alike: other classes of the same structure, which files call by this name too.
        permuted: whether llama.cpp has put the rows of queries and keys in another order; see `restored`.
    """

    model_type: str
    causal_lm: str
    layer: Mapping[str, str] = field(default_factory=lambda: _LAYER)
    alike: tuple[str, ...] = ()
    permuted: bool = False

    def restored(
        self, name: str, values: Float[np.ndarray, "*shape"], config: Mapping[str, Any]
    ) -> Float[np.ndarray, "*shape"]:
        """A tensor with the rows in Hugging Face's order.

        Rotation pairs dimension `i` of a head with `i + dim / 2` there, with its neighbour in llama.cpp, which
        interleaves the two halves of each head of LLaMA's queries and keys when it converts.
        """
        part = name.split(".")[-2]
        if not self.permuted or part not in ("attn_q", "attn_k"):
            return values
        heads = _heads(config)[part == "attn_k"]
        halves = values.reshape(heads, len(values) // heads // 2, 2, *values.shape[1:])
        return halves.swapaxes(1, 2).reshape(values.shape)

    def arranged(
        self, name: str, values: Float[np.ndarray, "*shape"], config: Mapping[str, Any]
    ) -> Float[np.ndarray, "*shape"]:
        """The inverse of `restored`."""
        part = name.split(".")[-2]
        if not self.permuted or part not in ("attn_q", "attn_k"):
            return values
        heads = _heads(config)[part == "attn_k"]
        pairs = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def _heads(config: Mapping[str, Any]) -> tuple[int, int]:
    """Of queries, and of keys and values."""
    own = config["num_attention_heads"]
    return own, config.get("num_key_value_heads") or own


_KNOWN = {
    "llama": Architecture("llama", "LlamaForCausalLM", alike=("MistralForCausalLM",), permuted=True),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", _LAYER | _QKV_BIAS),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", _LAYER | _QK_NORM),
}


def find(source: Source) -> Architecture:
    """The architecture of a file, or a `UserError` that lists the known ones."""
    name = source.get("general.architecture", str)
    if name not in _KNOWN:
        hint = f"known architectures: {', '.join(_KNOWN)}"
        raise UserError(f"the architecture '{name}' cannot be imported", where=str(source.path), hint=hint)
    return _KNOWN[name]


def config(source: Source, architecture: Architecture) -> dict[str, Any]:
    """The `config.json`. A setting without a meaning there is a `UserError`, never a model that is quietly another."""
    name = source.get("general.architecture", str)
    for key in source.keys:
        own = key.removeprefix(f"{name}.")
        if own != key and own not in _SETTINGS and own not in _ELSEWHERE:
            raise UserError(f"the setting '{key}' cannot be represented", where=str(source.path))
    if "token_embd.weight" not in source.names:
        raise UserError("holds no token embedding", where=str(source.path), hint="fetch the file again")
    hf: dict[str, Any] = {"architectures": [architecture.causal_lm], "model_type": architecture.model_type}
    hf |= {theirs: source.get(f"{name}.{ours}", kind) for ours, (theirs, kind) in _SETTINGS.items()}
    heads = hf["num_attention_heads"]
    hf["num_key_value_heads"] = source.get(f"{name}.attention.head_count_kv", int, heads)
    hf["head_dim"] = source.get(f"{name}.attention.key_length", int, hf["hidden_size"] // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        found = source.get(f"{name}.{key}", int, hf["head_dim"])
        if found != hf["head_dim"]:
            why = f"'{name}.{key}' is {found} where a head has {hf['head_dim']}: cannot be represented"
            raise UserError(why, where=str(source.path))
    hf["vocab_size"] = source.shape("token_embd.weight")[0]
    hf["hidden_act"] = "silu"
    hf["rope_theta"] = source.get(f"{name}.rope.freq_base", float, 10_000.0)
    scaling = source.get(f"{name}.rope.scaling.type", str, "none")
    if scaling not in ("none", "linear"):
        raise UserError(f"the rope scaling '{scaling}' cannot be represented", where=str(source.path))
    if scaling == "linear":
        factor = source.get(f"{name}.rope.scaling.factor", float)
        hf["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    hf["tie_word_embeddings"] = "output.weight" not in source.names
    return hf | {"torch_dtype": "float32"}


def _table(architecture: Architecture, num_layers: int) -> dict[str, str]:
    """The names of all tensors, here and there."""
    table = dict(_TOP)
    for i in range(num_layers):
        table |= {f"blk.{i}.{ours}": f"model.layers.{i}.{theirs}" for ours, theirs in architecture.layer.items()}
    return table


def placed(source: Source, architecture: Architecture, num_layers: int) -> dict[str, str]:
    """The name there of every tensor of the file. A strange or missing one is a `UserError`."""
    table = _table(architecture, num_layers)
    held = set(source.names)
    for name in source.names:
        if name not in table:
            raise UserError(f"the tensor '{name}' cannot be represented", where=str(source.path))
    for name in table:
        if name not in held and name != "output.weight":
            raise UserError(f"the tensor '{name}' is missing", where=str(source.path), hint="fetch the file again")
    return {name: theirs for name, theirs in table.items() if name in held}


# --- the other way ----------------------------------------------------------------------------------------------


def named(config: Mapping[str, Any], where: Path) -> tuple[str, Architecture]:
    """The `general.architecture` of a `config.json`, or a `UserError` that lists those that can be written."""
    for name, architecture in _KNOWN.items():
        if {architecture.causal_lm, *architecture.alike} & set(config.get("architectures") or ()):
            return name, architecture
    found = ", ".join(config.get("architectures") or ()) or "no architecture"
    hint = f"can be: {', '.join(name for one in _KNOWN.values() for name in (one.causal_lm, *one.alike))}"
    raise UserError(f"{found} cannot be written as GGUF", where=str(where), hint=hint)


def settings(name: str, config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """What a `config.json` says, as settings of a file. What has no meaning there is a `UserError`."""
    if lost := [theirs for theirs, _ in _SETTINGS.values() if config.get(theirs) is None]:
        raise UserError(f"does not say '{lost[0]}'", where=str(where), hint=f'add "{lost[0]}": … to it')
    found = {f"{name}.{ours}": kind(config[theirs]) for ours, (theirs, kind) in _SETTINGS.items()}
    heads, shared = _heads(config)
    size = config.get("head_dim") or config["hidden_size"] // heads
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    said = {
        "hidden_act": (config.get("hidden_act", "silu"), ("silu",)),
        "rope_scaling": (scaling, ("default", "linear")),
        "use_sliding_window": (config.get("use_sliding_window", False), (False,)),
        "sliding_window": (_window(config), (None,)),
    }
    for key, (value, can_be) in said.items():
        if value not in can_be:
            hint = f"can be: {' or '.join(map(str, can_be))}"
            raise UserError(f"{value!r} cannot be written as GGUF", where=f"{where}: {key}", hint=hint)
    own: dict[str, Any] = {
        "attention.head_count_kv": shared,
        "attention.key_length": size,
        "attention.value_length": size,
        "rope.dimension_count": size,
        "rope.freq_base": float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
    }
    if scaling == "linear":
        own |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return found | {f"{name}.{key}": value for key, value in own.items()}


def _window(config: Mapping[str, Any]) -> int | None:
    """How many tokens back each may see, where that is fewer than there may be."""
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    return None if window is None or window >= config["max_position_embeddings"] else window


def unplaced(names: Iterable[str], architecture: Architecture, num_layers: int, where: Path) -> dict[str, str]:
    """The inverse of `placed`: the name in the file of every tensor of a directory."""
    table = {theirs: ours for ours, theirs in _table(architecture, num_layers).items()}
    held = set(names)
    if strange := sorted(held - table.keys()):
        raise UserError(f"the tensor '{strange[0]}' has no name in GGUF", where=str(where))
    if missing := sorted(table.keys() - held - {"lm_head.weight"}):
        raise UserError(f"the tensor '{missing[0]}' is missing", where=str(where))
    return {theirs: ours for theirs, ours in table.items() if theirs in held}
