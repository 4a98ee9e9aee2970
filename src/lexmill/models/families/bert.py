"""BERT (Devlin et al. 2019): an encoder with norms after the residual and learned positions."""

from __future__ import annotations

from lexmill.models.families.table import Family, choice, fixed_ratio, head_size, key
from lexmill.models.heads import ClassifierShape, LanguageShape

FAMILY = Family(
    name="bert",
    architectures={
        "base": "BertModel",
        "classifier": "BertForSequenceClassification",
        "token_classifier": "BertForTokenClassification",
        "lm": "BertForMaskedLM",
    },
    prefix="bert.",
    fixed={
        "norm": "layer",
        "norm_place": "post",
        "embedding_norm": True,
        "final_norm": False,
        "positions": "learned",
        "rope_scaling": None,
        "gated": False,
        "causal": False,
        "window": None,
        "attention_bias": True,
        "mlp_bias": True,
    },
    settings=(
        key("vocab_size", "vocab_size", int, 30522),
        key("hidden_size", "hidden_size", int, 768),
        key("num_layers", "num_hidden_layers", int, 12),
        key("num_heads", "num_attention_heads", int, 12),
        fixed_ratio("num_kv_heads", "num_attention_heads", lambda hf: hf.get("num_attention_heads") or 12),
        fixed_ratio("head_dim", "num_attention_heads", head_size(768, 12)),
        key("intermediate_size", "intermediate_size", int, 3072),
        key("max_positions", "max_position_embeddings", int, 512),
        key("type_vocab_size", "type_vocab_size", int, 2),
        key("norm_eps", "layer_norm_eps", float, 1e-12),
        choice(
            "activation",
            "hidden_act",
            {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu"},
            "gelu",
        ),
        key("tied_output", "tie_word_embeddings", bool, True),
        key("dropout", "hidden_dropout_prob", float, 0.1),
        key("attention_dropout", "attention_probs_dropout_prob", float, 0.1),
        key("initializer_range", "initializer_range", float, 0.02),
    ),
    requires={
        "position_embedding_type": ("absolute", None),
        "is_decoder": (False, None),
        "add_cross_attention": (False, None),
    },
    weights=(
        ("embeddings.token.weight", "embeddings.word_embeddings.weight"),
        ("embeddings.position.weight", "embeddings.position_embeddings.weight"),
        ("embeddings.segment.weight", "embeddings.token_type_embeddings.weight"),
        *((f"embeddings.norm.{part}", f"embeddings.LayerNorm.{part}") for part in ("weight", "bias")),
        *(
            (f"layers.{{i}}.{ours}.{part}", f"encoder.layer.{{i}}.{theirs}.{part}")
            for ours, theirs in (
                ("attention.query", "attention.self.query"),
                ("attention.key", "attention.self.key"),
                ("attention.value", "attention.self.value"),
                ("attention.output", "attention.output.dense"),
                ("attention_norm", "attention.output.LayerNorm"),
                ("mlp.up", "intermediate.dense"),
                ("mlp.down", "output.dense"),
                ("mlp_norm", "output.LayerNorm"),
            )
            for part in ("weight", "bias")
        ),
    ),
    namespaces=("embeddings.", "encoder.", "pooler."),
    spare=(r"embeddings\.(position_ids|token_type_ids)", r"pooler\.dense\.(weight|bias)"),
    aliases={"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"},
    classifier=ClassifierShape(num_labels=2, transform="tanh", pooling="first", bias=True),
    heads={
        "classifier": {
            "transform.weight": "{prefix}pooler.dense.weight",
            "transform.bias": "{prefix}pooler.dense.bias",
            "output.weight": "classifier.weight",
            "output.bias": "classifier.bias",
        },
        "token_classifier": {"output.weight": "classifier.weight", "output.bias": "classifier.bias"},
        "lm": {
            "transform.weight": "cls.predictions.transform.dense.weight",
            "transform.bias": "cls.predictions.transform.dense.bias",
            "norm.weight": "cls.predictions.transform.LayerNorm.weight",
            "norm.bias": "cls.predictions.transform.LayerNorm.bias",
            "output.weight": "cls.predictions.decoder.weight",
            "output.bias": "cls.predictions.bias",
        },
    },
    language=lambda config: LanguageShape(bias=True, transform=config.activation, norm_eps=config.norm_eps),
)
