"""GPT-2 (Radford et al. 2019): a decoder with norms before the sub-layers and learned positions.

Its files keep queries, keys and values in one matrix, and matrices as `[in, out]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lexmill.models.families.table import Family, Json, Setting, Stored, choice, fixed_ratio, key
from lexmill.models.heads import ClassifierShape


def _heads(hf: Mapping[str, Any]) -> int:
    return hf.get("n_head") or 12


def _width(hf: Mapping[str, Any]) -> int:
    return hf.get("n_embd") or 768


def _read_dropout(hf: Mapping[str, Any]) -> float:
    return float(hf.get("resid_pdrop", 0.1))


def _write_dropout(hf: Json, value: Any) -> None:
    hf["resid_pdrop"] = hf["embd_pdrop"] = value


FAMILY = Family(
    name="gpt2",
    architectures={
        "base": "GPT2Model",
        "classifier": "GPT2ForSequenceClassification",
        "token_classifier": "GPT2ForTokenClassification",
        "lm": "GPT2LMHeadModel",
    },
    prefix="transformer.",
    fixed={
        "type_vocab_size": 0,
        "norm": "layer",
        "norm_place": "pre",
        "embedding_norm": False,
        "final_norm": True,
        "positions": "learned",
        "rope_scaling": None,
        "gated": False,
        "causal": True,
        "window": None,
        "attention_bias": True,
        "mlp_bias": True,
    },
    settings=(
        key("vocab_size", "vocab_size", int, 50257),
        key("hidden_size", "n_embd", int, 768),
        key("num_layers", "n_layer", int, 12),
        key("num_heads", "n_head", int, 12),
        fixed_ratio("num_kv_heads", "n_head", _heads),
        fixed_ratio("head_dim", "n_head", lambda hf: _width(hf) // _heads(hf)),
        key("intermediate_size", "n_inner", int, lambda hf: 4 * _width(hf)),
        key("max_positions", "n_positions", int, 1024),
        key("norm_eps", "layer_norm_epsilon", float, 1e-5),
        choice(
            "activation",
            "activation_function",
            {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu", "silu": "silu"},
            "gelu_new",
        ),
        key("tied_output", "tie_word_embeddings", bool, True),
        Setting("dropout", _read_dropout, _write_dropout, ("resid_pdrop", "embd_pdrop")),
        key("attention_dropout", "attn_pdrop", float, 0.1),
        key("initializer_range", "initializer_range", float, 0.02),
    ),
    requires={
        "scale_attn_weights": (True, None),
        "scale_attn_by_inverse_layer_idx": (False, None),
        "add_cross_attention": (False, None),
    },
    weights=(
        ("embeddings.token.weight", "wte.weight"),
        ("embeddings.position.weight", "wpe.weight"),
        *(
            (f"{ours}.{part}", f"{theirs}.{part}")
            for ours, theirs in (
                ("layers.{i}.attention_norm", "h.{i}.ln_1"),
                ("layers.{i}.mlp_norm", "h.{i}.ln_2"),
                ("norm", "ln_f"),
            )
            for part in ("weight", "bias")
        ),
        *(
            Stored(f"h.{{i}}.{theirs}.{part}", tuple(f"layers.{{i}}.{name}.{part}" for name in ours), transposed=True)
            for ours, theirs in (
                (("attention.query", "attention.key", "attention.value"), "attn.c_attn"),
                (("attention.output",), "attn.c_proj"),
                (("mlp.up",), "mlp.c_fc"),
                (("mlp.down",), "mlp.c_proj"),
            )
            for part in ("weight", "bias")
        ),
    ),
    namespaces=("wte.", "wpe.", "h.", "ln_f."),
    spare=(r"h\.\d+\.attn\.(bias|masked_bias)",),
    classifier=ClassifierShape(num_labels=2, transform=None, pooling="last", bias=False),
    heads={
        "classifier": {"output.weight": "score.weight"},
        "token_classifier": {"output.weight": "classifier.weight", "output.bias": "classifier.bias"},
        "lm": {"output.weight": "lm_head.weight"},
    },
)
