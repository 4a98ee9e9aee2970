"""Real rows, the tokenizer of MiniLM, and random models small enough to train in a moment."""

from __future__ import annotations

import json
import lzma
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from lexmill import models
from lexmill.data import banking77, collate
from lexmill.data.batch import Batch, Example
from lexmill.data.tokenizer import load_tokenizer
from lexmill.fit import model_directory
from lexmill.models import Model, ModelConfig
from lexmill.tasks import Classify, Generate, Task
from lexmill.tasks.classify import ClassifyOptions
from lexmill.tasks.generate import GenerateOptions

COLUMNS = {"text": "text", "label": "label"}
VOCABULARY = 30_522


@cache
def _banking() -> tuple[dict[str, str], ...]:
    with lzma.open(banking77()[0], "rt", encoding="utf-8") as file:
        return tuple(json.loads(line) for line in file)


def rows(count: int, *, classes: int = 4) -> list[dict[str, str]]:
    """Questions of the first `classes` intents of BANKING77, the intents in turn."""
    by_label: dict[str, list[dict[str, str]]] = {}
    for row in _banking():
        by_label.setdefault(row["label"], []).append(row)
    groups = list(by_label.values())[:classes]
    return [dict(groups[i % classes][i // classes]) for i in range(count)]


@cache
def tokenizer() -> Tokenizer:
    """MiniLM's; a task sets its truncation at each use."""
    return load_tokenizer(model_directory("minilm"))


def tiny_bert(seed: int = 0, **changes: Any) -> Model:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "head_dim": 8}
    sizes |= {"intermediate_size": 64, "max_positions": 128, "type_vocab_size": 2, "initializer_range": 0.1}
    return models.init(ModelConfig(VOCABULARY, **{**sizes, **changes}), "bert", seed)


def tiny_llama(seed: int = 0, **changes: Any) -> Model:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    sizes |= {"intermediate_size": 64, "max_positions": 128, "norm": "rms", "norm_place": "pre", "norm_eps": 1e-6}
    sizes |= {"embedding_norm": False, "final_norm": True, "positions": "rotary", "gated": True, "causal": True}
    sizes |= {"activation": "silu", "attention_bias": False, "mlp_bias": False, "tied_output": False}
    config = ModelConfig(VOCABULARY, **{**sizes, "initializer_range": 0.1, **changes})
    return models.init(config, "llama", seed)


def classifier(data: Sequence[dict[str, Any]], model: Model, **options: Any) -> Classify:
    """The task of these rows, its heads on the model; `columns` may be among the options."""
    columns = options.pop("columns", COLUMNS)
    task = Classify.from_records(data, columns, ClassifyOptions(**options))
    torch.manual_seed(1)
    task.attach(model)
    return task


def generator(model: Model, *, pair: bool = True, **options: Any) -> Generate:
    """Prompts are the texts, replies the labels."""
    columns = {"text": "text", "text_pair": "label"} if pair else {"text": "text"}
    task = Generate.from_records([], columns, GenerateOptions(**options))
    torch.manual_seed(1)
    task.attach(model)
    return task


def batch_of(task: Task, examples: Sequence[Example]) -> Batch:
    """The examples with every head of a classifier present, as a token cache gives them."""
    blanks: dict[str, np.ndarray] = {}
    if isinstance(task, Classify):
        multi = task.options.multi_label
        for head in task.heads.values():
            blanks[head.name] = np.zeros(len(head.labels), np.float32) if multi else np.zeros((), np.int64)
    return collate(examples, blanks)


class InMemory:
    """A data set for a `Trainer`, without a cache on disk."""

    def __init__(self, task: Task, examples: Sequence[Example]) -> None:
        self.task, self.examples = task, examples
        self.lengths = np.array([sum(len(seq.ids) for seq in one.streams["source"]) for one in examples])

    def __len__(self) -> int:
        return len(self.examples)

    def classes(self) -> np.ndarray:
        return np.array([int(one.labels["label"]) for one in self.examples])

    def batch(self, indices: np.ndarray) -> Batch:
        return batch_of(self.task, [self.examples[i] for i in indices])


def gradients(model: Model) -> dict[str, torch.Tensor]:
    """The gradients accumulated, by name and dense, which are then forgotten."""
    found = {n: p.grad.to_dense() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The norm of the difference over the norm of `b`, all parameters together."""
    assert a.keys() == b.keys()
    assert a
    difference = torch.stack([(a[name] - b[name]).norm() for name in b]).norm()
    return float(difference / torch.stack([one.norm() for one in b.values()]).norm())


def stored(model: Model, directory: Path) -> Path:
    """A model directory for `fit`."""
    directory.mkdir()
    models.save(model, directory)
    tokenizer().no_truncation()
    tokenizer().save(str(directory / "tokenizer.json"))
    return directory


def write_rows(path: Path, data: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in data), "utf-8")
    return path
