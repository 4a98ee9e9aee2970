"""A step of decoding, straight through, against the whole text computed anew."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lexmill import models
from lexmill.models import Model, ModelConfig
from lexmill.models.steps import Steps
from lexmill.nn.cache import KVCache
from lexmill.nn.int8 import Int8Linear
from lexmill.nn.layout import Packed
from lexmill.nn.linear import Linear
from lexmill.nn.weight_only import Form, WeightOnlyLinear

LLAMA: dict[str, Any] = {
    "norm": "rms",
    "norm_place": "pre",
    "positions": "rotary",
    "gated": True,
    "activation": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "embedding_norm": False,
    "final_norm": True,
    "num_kv_heads": 2,
}
QWEN3 = {**LLAMA, "qk_norm": True}
GPT2: dict[str, Any] = {"norm_place": "pre", "embedding_norm": False, "final_norm": True, "num_kv_heads": 4}


def decoder(changes: dict[str, Any]) -> Model:
    shape: dict[str, Any] = {
        "vocab_size": 96,
        "hidden_size": 64,
        "num_layers": 3,
        "num_heads": 4,
        "head_dim": 16,
        "intermediate_size": 96,
        "max_positions": 64,
        "causal": True,
        "initializer_range": 0.1,
        **changes,
    }
    return models.init(ModelConfig(**shape), "llama", 0).eval()


def put(model: Model, kind: str) -> None:
    """Make codes of the layers."""
    for path, layer in list(model.trunk.layers.named_modules()):
        if type(layer) is Linear:
            parent, _, name = path.rpartition(".")
            made = Int8Linear.of(layer, None) if kind == "token" else WeightOnlyLinear.of(layer, Form("int8"))
            setattr(model.trunk.layers.get_submodule(parent), name, made)


def whole(model: Model, texts: list[list[int]]) -> Tensor:
    """The last hidden state of each text, nothing kept of earlier ones."""
    layout = Packed.of([len(text) for text in texts])
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    return model.trunk(torch.tensor([token for text in texts for token in text]), positions, layout, only="last")


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        (LLAMA, "dense"),
        (QWEN3, "dense"),
        (GPT2, "dense"),
        (LLAMA, "int8"),
        (QWEN3, "int8"),
        (GPT2, "int8"),
        ({**LLAMA, "num_kv_heads": 4}, "token"),
    ],
)
@pytest.mark.parametrize("texts", [[[5, 6], [7, 8]], [[1, 2, 3, 4, 5], [9], [8, 7]]])
def test_a_step_is_the_whole_text_computed_anew(changes: dict[str, Any], kind: str, texts: list[list[int]]) -> None:
    model = decoder(changes)
    if kind != "dense":
        put(model, kind)
    with torch.inference_mode():
        compare(model, texts, 1e-5 if kind == "dense" else 4e-2)


def compare(model: Model, texts: list[list[int]], most: float) -> None:
    steps = Steps.of(model.trunk)
    assert steps is not None
    texts, cache = [list(text) for text in texts], model.trunk.new_cache(len(texts), 8)
    assert isinstance(cache, KVCache)
    layout = Packed.of([len(text) for text in texts])
    model.trunk(
        torch.tensor([token for text in texts for token in text]),
        torch.cat([torch.arange(len(t)) for t in texts]),
        layout,
        cache=cache,
    )
    rows = model.trunk.layer_rows
    for turn in range(12):  # past the capacity
        new = [(turn * 7 + i) % 96 for i in range(len(texts))]
        for text, token in zip(texts, new, strict=True):
            text.append(token)
        found, wanted = steps(torch.tensor(new), cache), whole(model, texts)
        assert float((found - wanted).norm() / wanted.norm()) < most
        if turn == 6 and len(texts) > 1:
            cache.keep(torch.tensor([1]))
            texts = texts[1:2]
    assert cache.lengths.tolist() == [len(text) for text in texts]
    assert model.trunk.layer_rows > rows


@pytest.mark.parametrize(
    "changes", [{**LLAMA, "window": 4}, {**LLAMA, "rope_interleaved": True}, {**LLAMA, "norm_place": "around"}]
)
def test_what_is_not_known_goes_the_usual_way(changes: dict[str, Any]) -> None:
    assert Steps.of(decoder(changes).trunk) is None


def test_a_layer_that_is_listened_to_is_called_as_a_whole() -> None:
    model, heard = decoder(LLAMA), []
    model.trunk.layers[0].register_forward_hook(lambda *seen: heard.append(1))
    assert Steps.of(model.trunk) is None
    model.add_language_head("lm")
    models.greedy(model, [[1, 2]], 4)
    assert len(heard) == 4
