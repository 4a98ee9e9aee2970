"""ModernBERT (Warner et al. 2024): an encoder with norms before the sub-layers, rotary positions, gates, and layers of
which most see only their neighbourhood, rotated by a base of their own.

`mlp_dropout` stands for all dropout outside attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lexmill.errors import UserError
from lexmill.models.config import LayerOverride
from lexmill.models.families.table import Family, Json, Setting, Stored, choice, fixed_ratio, head_size, key
from lexmill.models.heads import ClassifierShape

_THETA = {"full_attention": ("global_rope_theta", 160_000.0), "sliding_attention": ("local_rope_theta", 10_000.0)}
_ROPE_KEYS = ("rope_parameters", "rope_scaling")


def _read_theta(hf: Mapping[str, Any], kind: str) -> float:
    rope: Mapping[str, Any] = (hf.get("rope_parameters") or {}).get(kind) or hf.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{dict(rope)!r} cannot be represented", where="rope_parameters", hint="can be: rope_theta")
    old_key, default = _THETA[kind]
    return float(rope.get("rope_theta", hf.get(old_key, default)))


def _write_theta(hf: Json, kind: str, value: float) -> None:
    thetas = {name: value if name == kind else _read_theta(hf, name) for name in _THETA}
    hf["rope_parameters"] = {name: {"rope_type": "default", "rope_theta": theta} for name, theta in thetas.items()}
    for old_key, _ in _THETA.values():
        hf.pop(old_key, None)


def _read_layers(hf: Mapping[str, Any]) -> tuple[LayerOverride, ...]:
    every = hf.get("global_attn_every_n_layers", 3)
    kinds: list[str] | None = hf.get("layer_types")
    if kinds is None:
        kinds = ["sliding_attention" if i % every else "full_attention" for i in range(hf.get("num_hidden_layers", 22))]
    for kind in kinds:
        if kind not in _THETA:
            raise UserError(f"'{kind}' cannot be represented", where="layer_types", hint=f"can be: {', '.join(_THETA)}")
    # A token sees those up to half of `local_attention` away, and that distance too.
    window = hf.get("local_attention", 128) // 2 + 1
    local = LayerOverride(window=window, rope_theta=_read_theta(hf, "sliding_attention"))
    if "sliding_attention" not in kinds:
        return ()
    return tuple(local if kind == "sliding_attention" else LayerOverride() for kind in kinds)


def _write_layers(hf: Json, value: tuple[LayerOverride, ...]) -> None:
    local = {(layer.window, layer.rope_theta) for layer in value} - {(None, None)}
    if len(local) > 1 or any(None in both for both in local):
        raise UserError("a config of this family can say one window and one rope_theta of local layers", where="layers")
    for window, theta in local:
        assert window is not None
        assert theta is not None
        hf["local_attention"] = 2 * (window - 1)
        _write_theta(hf, "sliding_attention", theta)
    kinds = ["full_attention" if layer.window is None else "sliding_attention" for layer in value]
    hf["layer_types"] = kinds or ["full_attention"] * hf["num_hidden_layers"]
    hf.pop("global_attn_every_n_layers", None)


def _write_dropout(hf: Json, value: Any) -> None:
    hf["mlp_dropout"] = hf["embedding_dropout"] = value


_HEAD = (
    choice("transform", "classifier_activation", {"gelu": "gelu", "relu": "relu"}, "gelu"),
    key("transform_bias", "classifier_bias", bool, False),
    key("norm_eps", "norm_eps", float, 1e-5),
    key("norm_bias", "norm_bias", bool, False),
)
_HEAD_NAMES = {
    "transform.weight": "head.dense.weight",
    "transform.bias": "head.dense.bias",
    "norm.weight": "head.norm.weight",
    "norm.bias": "head.norm.bias",
}

FAMILY = Family(
    name="modernbert",
    architectures={
        "base": "ModernBertModel",
        "classifier": "ModernBertForSequenceClassification",
        "token_classifier": "ModernBertForTokenClassification",
        "lm": "ModernBertForMaskedLM",
    },
    prefix="model.",
    fixed={
        "norm": "layer",
        "norm_place": "pre",
        "embedding_norm": True,
        "final_norm": True,
        "first_norm": False,
        "positions": "rotary",
        "gated": True,
        "causal": False,
    },
    settings=(
        key("vocab_size", "vocab_size", int, 50368),
        key("hidden_size", "hidden_size", int, 768),
        key("num_layers", "num_hidden_layers", int, 22),
        key("num_heads", "num_attention_heads", int, 12),
        fixed_ratio("num_kv_heads", "num_attention_heads", lambda hf: hf.get("num_attention_heads") or 12),
        fixed_ratio("head_dim", "num_attention_heads", head_size(768, 12)),
        key("intermediate_size", "intermediate_size", int, 1152),
        key("max_positions", "max_position_embeddings", int, 8192),
        key("norm_eps", "norm_eps", float, 1e-5),
        key("norm_bias", "norm_bias", bool, False),
        Setting(
            "rope_theta",
            lambda hf: _read_theta(hf, "full_attention"),
            lambda hf, value: _write_theta(hf, "full_attention", value),
            (*_ROPE_KEYS, "global_rope_theta"),
        ),
        Setting(
            "layers",
            _read_layers,
            _write_layers,
            (*_ROPE_KEYS, "local_rope_theta", "layer_types", "global_attn_every_n_layers", "local_attention"),
        ),
        choice(
            "activation",
            "hidden_activation",
            {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "silu": "silu", "relu": "relu"},
            "gelu",
        ),
        key("attention_bias", "attention_bias", bool, False),
        key("mlp_bias", "mlp_bias", bool, False),
        key("tied_output", "tie_word_embeddings", bool, True),
        Setting(
            "dropout",
            lambda hf: float(hf.get("mlp_dropout", 0.0)),
            _write_dropout,
            ("mlp_dropout", "embedding_dropout"),
        ),
        key("attention_dropout", "attention_dropout", float, 0.0),
        key("initializer_range", "initializer_range", float, 0.02),
    ),
    weights=(
        ("embeddings.token.weight", "embeddings.tok_embeddings.weight"),
        *(
            (f"{ours}.{part}", f"{theirs}.{part}")
            for ours, theirs in (
                ("embeddings.norm", "embeddings.norm"),
                ("layers.{i}.attention_norm", "layers.{i}.attn_norm"),
                ("layers.{i}.attention.output", "layers.{i}.attn.Wo"),
                ("layers.{i}.mlp_norm", "layers.{i}.mlp_norm"),
                ("layers.{i}.mlp.down", "layers.{i}.mlp.Wo"),
                ("norm", "final_norm"),
            )
            for part in ("weight", "bias")
        ),
        *(
            Stored(f"layers.{{i}}.{theirs}.{part}", tuple(f"layers.{{i}}.{name}.{part}" for name in ours))
            for ours, theirs in (
                (("attention.query", "attention.key", "attention.value"), "attn.Wqkv"),
                (("mlp.gate", "mlp.up"), "mlp.Wi"),
            )
            for part in ("weight", "bias")
        ),
    ),
    namespaces=("embeddings.", "layers.", "final_norm."),
    classifier=ClassifierShape(num_labels=2, transform="gelu", pooling="first", bias=True),
    classifier_settings=(
        *_HEAD,
        choice("pooling", "classifier_pooling", {"cls": "first", "mean": "mean"}, "cls"),
    ),
    token_classifier=ClassifierShape(num_labels=2, transform="gelu", pooling=None),
    token_settings=_HEAD,
    language_settings=(*_HEAD, key("bias", "decoder_bias", bool, True)),
    heads={
        "classifier": {
            **_HEAD_NAMES,
            "output.weight": "classifier.weight",
            "output.bias": "classifier.bias",
        },
        "token_classifier": {**_HEAD_NAMES, "output.weight": "classifier.weight", "output.bias": "classifier.bias"},
        "lm": {
            **_HEAD_NAMES,
            "output.weight": "decoder.weight",
            "output.bias": "decoder.bias",
        },
    },
)
