"""Small decoders with random weights."""

from __future__ import annotations

from typing import Any

from lexmill import models
from lexmill.models import Model, ModelConfig


def small_decoder(family: str, **changes: Any) -> Model:
    shape: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 64,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 4,
        "head_dim": 16,
        "intermediate_size": 128,
        "max_positions": 64,
        "causal": True,
        "tied_output": True,
        "initializer_range": 0.2,
        **changes,
    }
    model = models.init(ModelConfig(**shape), family, 0)
    model.add_language_head("lm")
    return model.eval()


LLAMA = {
    "norm": "rms",
    "norm_place": "pre",
    "positions": "rotary",
    "gated": True,
    "activation": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "embedding_norm": False,
    "final_norm": True,
}
GPT2 = {"norm_place": "pre", "positions": "learned", "embedding_norm": False, "final_norm": True}
