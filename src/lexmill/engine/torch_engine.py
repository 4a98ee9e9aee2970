"""Runs requests in torch: sorted by length, packed without padding, cut by a token budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from lexmill.artifact import Artifact
from lexmill.engine.base import Work
from lexmill.engine.loaded import Loaded, load
from lexmill.engine.mixed import batches_by_adapter
from lexmill.engine.runtime import Item, Runtime
from lexmill.nn.int8 import Int8Linear
from lexmill.nn.linear import Linear, pack
from lexmill.nn.weight_only import WeightOnlyLinear

CPU_TOKEN_BUDGET = 2048
"""Best of 256 to 8192 for MiniLM on two cores: beyond it activations leave the cache, below it matrices get small."""
GPU_TOKEN_BUDGET = 32_768


class TorchEngine(Runtime):
    """An `Engine` on torch for one artefact.

    Args:
        source: an artefact, its path, or what training has in memory (which is set to evaluation mode).
        file: None; the model is where the source says.
        device: where the model runs, e.g. `cpu` or `cuda:0`.
        token_budget: most tokens of one forward pass; an item longer than that runs alone. Where None, what suits the
            device.
        threads: threads of torch in this process; as torch has them where None.
    """

    runtime: ClassVar[str] = "torch"

    def __init__(
        self,
        source: Artifact | Path | str | Loaded,
        *,
        file: Path | None = None,
        device: str = "cpu",
        token_budget: int | None = None,
        threads: int | None = None,
    ) -> None:
        if file is not None:
            raise ValueError("this runtime reads the model of an artefact, and no other file")
        where = torch.device(device)
        token_budget = budget_for(where) if token_budget is None else token_budget
        if threads is not None:
            torch.set_num_threads(threads)
        loaded = source if isinstance(source, Loaded) else load(source)
        super().__init__(loaded, token_budget)
        for one in (loaded, *loaded.adapters.values()):
            pack(one.model.to(where).eval(), token_budget)
            one.model.trunk.straighten()
        self._work = Work()

    @classmethod
    def takes(cls, artifact: Artifact) -> bool:
        return True

    @property
    def record(self) -> Mapping[str, Any]:
        """`products`: how many matrices there are by what multiplied them last, or by their precision."""
        model = self._loaded.model
        told = {"runtime": self.runtime, "version": torch.__version__, "device": str(model.device)}
        return {**told, "products": products_of(model)}

    @property
    def work(self) -> Work:
        return self._work

    def _forward(self, items: Sequence[Item]) -> list[Any]:
        answers: list[Any] = [None] * len(items)
        parts = batches_by_adapter(self._loaded.model, [one.example for one in items], [one.adapter for one in items])
        trunk, tokens = self._loaded.model.trunk, sum(batch.num_tokens for _, batch in parts.values())
        exited = trunk.exited_rows
        for adapter, (own, batch) in parts.items():
            loaded = self._loaded.of(adapter)
            with loaded.acting() as model:
                records, hear = [items[i].record for i in own], [items[i].hear for i in own]
                if any(hear):
                    found = loaded.task.speak(model, batch, records, loaded.tokenizer, hear)
                else:
                    found = loaded.task.answer(model, batch, records, loaded.tokenizer)
            for i, answer in zip(own, found, strict=True):
                answers[i] = answer
        computed = tokens - round((trunk.exited_rows - exited) / len(trunk.layers))
        self._work = Work(self._work.tokens + tokens, self._work.positions + computed)
        return answers


def budget_for(device: torch.device) -> int:
    """The most tokens of a forward pass that suit a device."""
    return CPU_TOKEN_BUDGET if device.type == "cpu" else GPU_TOKEN_BUDGET


def products_of(model: nn.Module) -> dict[str, int]:
    """How many linear layers there are, by the kernel that multiplied them last, or by the precision of the matrix."""
    kinds = Counter[str]()
    for layer in model.modules():
        if isinstance(layer, (Int8Linear, WeightOnlyLinear)):
            kinds[str(layer.ran)] += 1
        elif isinstance(layer, Linear):
            kinds[str(layer.like.dtype).removeprefix("torch.")] += 1
    return dict(kinds)
