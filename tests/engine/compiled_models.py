"""What compiled models answer, as JSON: the checks of shapes that tests put into every function cannot be compiled."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
import torch
from tests.small_classifier import small_classifier, small_tokenizer

from lexmill import models
from lexmill.engine import CompiledEngine, Engine, Loaded, Request, TorchEngine, batch_dependence, probes
from lexmill.engine.torch_engine import products_of
from lexmill.models import RecurrentConfig
from lexmill.nn.int8 import Grid, Int8Linear

REQUESTS = [Request({"question": text}) for text in probes.probe_texts()[:32]]


def in_int8(grid: Grid | None) -> Loaded:
    loaded = small_classifier()
    for block in loaded.model.trunk.layers:
        for holder, names in ((block.attention, ("query", "key", "value", "output")), (block.mlp, ("up", "down"))):
            for name in names:
                setattr(holder, name, Int8Linear.of(getattr(holder, name), grid))
    return loaded


def recurrent() -> Loaded:
    model = models.init(RecurrentConfig(1500, "lstm", 16, 12), "lstm", 0)
    task = small_classifier().task
    torch.manual_seed(0)
    task.attach(model)
    return Loaded(task, model.eval(), small_tokenizer(), "small")


def traced() -> bool:
    """Whether layers in bytes do bit for bit the same in one graph."""
    block = in_int8(Grid.over(-4.0, 4.0)).model.trunk.layers[0]
    x = torch.randn(7, 32)
    with torch.inference_mode():
        expected = block.attention.query(x), block.mlp(x)
        run = torch.compile(lambda x: (block.attention.query(x), block.mlp(x)), backend="eager", fullgraph=True)
        return all(torch.equal(a, b) for a, b in zip(run(x), expected, strict=True))


def logits(engine: Engine) -> np.ndarray:
    return np.stack([answer["label"] for answer in engine.run(REQUESTS)])


def compiled(loaded: Loaded) -> dict[str, Any]:
    expected = logits(TorchEngine(loaded))
    engine = CompiledEngine(loaded, token_budget=300)
    off = float(np.abs(logits(engine) - expected).max() / np.abs(expected).max())
    moved = batch_dependence(engine, REQUESTS)
    return {"off": off, "moved": moved, "expected_products": products_of(loaded.model), **engine.record}


if __name__ == "__main__":
    cases = {
        "traced": traced,
        "dense": lambda: compiled(small_classifier()),
        "int8": lambda: compiled(in_int8(Grid.over(-4.0, 4.0))),
        "lstm": lambda: compiled(recurrent()),
    }
    print(json.dumps({name: cases[name]() for name in sys.argv[1:]}))
