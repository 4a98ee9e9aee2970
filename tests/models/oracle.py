"""Random reference models of `transformers`, and how far ours are from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lexmill.nn import Dense, Packed

BERTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_layer_no_pairs": {"num_hidden_layers": 1, "type_vocab_size": 1, "hidden_act": "relu"},
    "tanh_gelu_wide": {"hidden_act": "gelu_new", "intermediate_size": 100, "layer_norm_eps": 1e-5},
}

LLAMAS: dict[str, dict[str, Any]] = {
    "plain_untied": {},
    "grouped_tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "one_kv_head_wide_heads": {"num_key_value_heads": 1, "head_dim": 24},
    "biased": {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu", "rms_norm_eps": 1e-5},
    "llama3_rope": {
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "linear_rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
}

MODERN = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}

ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {}),
    "roberta": ("Roberta", {"type_vocab_size": 1}),
    "roberta_other_padding": ("Roberta", {"pad_token_id": 3, "hidden_act": "gelu_new"}),
    "xlm_roberta": ("XLMRoberta", {"layer_norm_eps": 1e-5}),
    "distilbert": ("DistilBert", {"hidden_dim": 40, "activation": "relu"}),
    "ernie": ("Ernie", {}),
    "ernie_with_tasks": ("Ernie", {"use_task_id": True, "task_type_vocab_size": 4}),
    "albert": ("Albert", {"embedding_size": 12, "num_hidden_layers": 4}),
    "albert_in_groups": (
        "Albert",
        {
            "embedding_size": 32,
            "num_hidden_layers": 5,
            "num_hidden_groups": 3,
            "inner_group_num": 2,
            "hidden_act": "relu",
        },
    ),
    "modernbert": ("ModernBert", MODERN | {"num_hidden_layers": 5, "local_attention": 6}),
    "modernbert_odd_window_mean_biased": (
        "ModernBert",
        MODERN
        | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "num_hidden_layers": 3}
        | {"local_attention": 9, "classifier_pooling": "mean", "classifier_activation": "relu", "classifier_bias": True}
        | {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "norm_eps": 1e-3, "hidden_activation": "silu"}
        | {"rope_parameters": {"full_attention": {"rope_theta": 500.0}, "sliding_attention": {"rope_theta": 7.0}}},
    ),
    "modernbert_without_windows": (
        "ModernBert",
        MODERN | {"global_attn_every_n_layers": 1, "classifier_pooling": "mean"},
    ),
}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {}),
    "gpt2_narrow_relu": ("GPT2", {"n_inner": 40, "activation_function": "relu", "layer_norm_epsilon": 1e-3}),
    "llama": ("Llama", {"num_key_value_heads": 2}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 4}),
    "mistral_without_window": ("Mistral", {"num_key_value_heads": 1, "sliding_window": None, "head_dim": 16}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen2_tied": ("Qwen2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "glm": ("Glm", {"num_key_value_heads": 2, "head_dim": 12, "num_hidden_layers": 3}),
    "glm4": ("Glm4", {"num_key_value_heads": 1, "head_dim": 8, "num_hidden_layers": 3, "hidden_act": "gelu"}),
    "glm4_three_quarters": (
        "Glm4",
        {"num_key_value_heads": 2, "head_dim": 16, "attention_bias": False, "tie_word_embeddings": True}
        | {
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 50.0, "partial_rotary_factor": 0.75}
        },
    ),
    "qwen3_biased": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 8, "attention_bias": True}),
}

LENGTHS = [7, 3, 12, 3, 7, 1]


def reference(kind: str, head: str = "", **changes: Any) -> Any:
    """A random model: `kind` is the beginning, `head` the end of its class's name."""
    import transformers

    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
    model = getattr(transformers, f"{kind}{head or 'Model'}")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def stored(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    return directory


class Texts:
    """Random sequences, packed and padded. Id 0 is padding only."""

    def __init__(self, lengths: list[int] = LENGTHS, vocab: int = 97, types: int = 2) -> None:
        self.layout = Packed.of(lengths)
        total = self.layout.num_tokens
        self.ids = torch.randint(1, vocab, (total,))
        self.types = torch.randint(0, types, (total,))
        self.positions = torch.arange(total) - self.layout.offsets[:-1][self.layout.sequence]
        rows, self.mask = self.layout.padded.rows, self.layout.padded.mask
        self.dense_ids = self.ids[rows] * self.mask
        self.dense_types = self.types[rows] * self.mask
        self.dense_positions = torch.arange(rows.shape[1]).expand_as(rows)
        self.dense_layout = Dense(self.mask)

    @property
    def packed(self) -> tuple[Tensor, Tensor, Packed]:
        return self.ids, self.positions, self.layout

    @property
    def dense(self) -> tuple[Tensor, Tensor, Dense]:
        return self.dense_ids, self.dense_positions, self.dense_layout

    def rows(self, padded: Tensor) -> Tensor:
        return padded.flatten(0, 1)[self.layout.padded.cells]


def gap(ours: Tensor, theirs: Tensor) -> float:
    """max |a - b| / max |b|"""
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())
