"""Runs requests in torch: sorted by length, packed without padding, cut by a token budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch

from lexmill.artifact import Artifact
from lexmill.data.batch import Example
from lexmill.engine.base import Cancelled, Expired, Request, Work
from lexmill.engine.loaded import Loaded, load
from lexmill.engine.mixed import batches_by_adapter
from lexmill.errors import UserError
from lexmill.nn.linear import pack
from lexmill.tasks.base import Hear, Record, Task

CPU_TOKEN_BUDGET = 2048
"""Best of 256 to 8192 for MiniLM on two cores: beyond it activations leave the cache, below it matrices get small."""
GPU_TOKEN_BUDGET = 32_768
CHUNK = 1024

T = TypeVar("T")


class TorchEngine:
    """An `Engine` on torch for one artefact.

    Args:
        source: an artefact, its path, or what training has in memory (which is set to evaluation mode).
        device: where the model runs, e.g. `cpu` or `cuda:0`.
        token_budget: most tokens of one forward pass; an item longer than that runs alone. Where None, what suits the
            device.
        threads: threads of torch in this process; as torch has them where None.
    """

    def __init__(
        self,
        source: Artifact | Path | str | Loaded,
        *,
        device: str = "cpu",
        token_budget: int | None = None,
        threads: int | None = None,
    ) -> None:
        where = torch.device(device)
        if token_budget is None:
            token_budget = CPU_TOKEN_BUDGET if where.type == "cpu" else GPU_TOKEN_BUDGET
        if token_budget < 1:
            raise ValueError(f"token_budget is {token_budget}, must be at least 1")
        if threads is not None:
            torch.set_num_threads(threads)
        loaded = source if isinstance(source, Loaded) else load(source)
        self.name = loaded.name
        self._loaded = loaded
        for one in (loaded, *loaded.adapters.values()):
            pack(one.model.to(where).eval(), token_budget)
            one.model.trunk.straighten()
        self._token_budget = token_budget
        self._work = Work()

    @property
    def task(self) -> Task:
        return self._loaded.task

    @property
    def adapters(self) -> Sequence[str]:
        return tuple(self._loaded.adapters)

    def task_for(self, adapter: str | None) -> Task:
        return self._loaded.of(adapter).task

    @property
    def work(self) -> Work:
        return self._work

    def run(self, requests: Sequence[Request]) -> list[Any]:
        answers: list[Any] = [self._refusal(request) for request in requests]
        rows = [row for row, refusal in enumerate(answers) if refusal is None]
        asked = [requests[row] for row in rows]
        records = [request.record for request in asked]
        adapters = [request.adapter for request in asked]
        examples = self._encode_by_adapter(records, adapters)
        hear = [request.hear for request in asked]
        found = self._compute(examples, records, adapters, lambda i: self._refusal(asked[i]), hear)
        for row, answer in zip(rows, found, strict=True):
            answers[row] = answer
        return answers

    def run_stream(
        self, records: Iterable[Record], *, chunk: int = CHUNK, labelled: bool = False, adapter: str | None = None
    ) -> Iterator[tuple[Record, Any]]:
        """Answer records in order without holding more than `chunk` of them; a larger chunk sorts better by length.

        With `labelled` the task sees their labels too, as `evaluate` needs. Yields each record with its answer, or with
        the exception that stands in its place. An `adapter` that there is not is a `UserError`.
        """
        source, loaded = iter(records), self._loaded.of(adapter)
        while rows := list(islice(source, chunk)):
            examples = self._encode(loaded.task, rows, labelled=labelled)
            yield from zip(rows, self._compute(examples, rows, [adapter] * len(rows)), strict=True)

    def _refusal(self, request: Request) -> Exception | None:
        if request.cancel.is_set():
            return Cancelled()
        if request.deadline is not None and time.monotonic() > request.deadline:
            return Expired()
        if request.artifact not in ("", self.name):
            return UserError(f"unknown model '{request.artifact}'", hint=f"this engine holds '{self.name}'")
        if request.head is not None:
            return UserError("this engine answers with every head", hint="leave head out")
        try:
            self._loaded.of(request.adapter)
        except UserError as unknown:
            return unknown
        return None

    def _encode(self, task: Task, records: Sequence[Record], *, labelled: bool) -> list[Example | Exception]:
        return _isolated(lambda some: task.encode(some, self._loaded.tokenizer, labelled=labelled), records)

    def _encode_by_adapter(
        self, records: Sequence[Record], adapters: Sequence[str | None]
    ) -> list[Example | Exception]:
        examples: list[Any] = [None] * len(records)
        for adapter in dict.fromkeys(adapters):
            own = [i for i, name in enumerate(adapters) if name == adapter]
            found = self._encode(self._loaded.of(adapter).task, [records[i] for i in own], labelled=False)
            for i, example in zip(own, found, strict=True):
                examples[i] = example
        return examples

    def _compute(
        self,
        examples: Sequence[Example | Exception],
        records: Sequence[Record],
        adapters: Sequence[str | None],
        refusal: Callable[[int], Exception | None] | None = None,
        hear: Sequence[Hear | None] | None = None,
    ) -> list[Any]:
        """Answers in the order of `examples`. `refusal` is asked again before each forward pass, since time goes by."""
        answers: list[Any] = [example if isinstance(example, Exception) else None for example in examples]
        lengths = {i: num_tokens(example) for i, example in enumerate(examples) if isinstance(example, Example)}
        for part in micro_batches(lengths, self._token_budget):
            if refusal is not None:
                for i in part:
                    answers[i] = refusal(i)
            due = [i for i in part if answers[i] is None]
            heard = [None if hear is None else hear[i] for i in due]
            items = [(examples[i], records[i], adapters[i], told) for i, told in zip(due, heard, strict=True)]
            found = _isolated(self._forward, items)
            for i, answer in zip(due, found, strict=True):
                answers[i] = answer
        return answers

    @torch.inference_mode()
    def _forward(self, items: Sequence[tuple[Any, Record, str | None, Hear | None]]) -> list[Any]:
        answers: list[Any] = [None] * len(items)
        parts = batches_by_adapter(self._loaded.model, [one[0] for one in items], [one[2] for one in items])
        trunk, tokens = self._loaded.model.trunk, sum(batch.num_tokens for _, batch in parts.values())
        exited = trunk.exited_rows
        for adapter, (own, batch) in parts.items():
            loaded = self._loaded.of(adapter)
            with loaded.acting() as model:
                records, hear = [items[i][1] for i in own], [items[i][3] for i in own]
                if any(hear):
                    found = loaded.task.speak(model, batch, records, loaded.tokenizer, hear)
                else:
                    found = loaded.task.answer(model, batch, records, loaded.tokenizer)
            for i, answer in zip(own, found, strict=True):
                answers[i] = answer
        computed = tokens - round((trunk.exited_rows - exited) / len(trunk.layers))
        self._work = Work(self._work.tokens + tokens, self._work.positions + computed)
        return answers


def num_tokens(example: Example) -> int:
    """Tokens of all streams of an example."""
    return sum(len(tokens.ids) for stream in example.streams.values() for tokens in stream)


def micro_batches(lengths: dict[int, int], budget: int) -> Iterator[list[int]]:
    """Cut the keys of `lengths`, shortest first, into runs of at most `budget` tokens. A longer one stands alone."""
    part: list[int] = []
    tokens = 0
    for i in sorted(lengths, key=lengths.__getitem__):
        if part and tokens + lengths[i] > budget:
            yield part
            part, tokens = [], 0
        part.append(i)
        tokens += lengths[i]
    if part:
        yield part


def _isolated(work: Callable[[Sequence[T]], Sequence[Any]], items: Sequence[T]) -> list[Any]:
    """`work` on all items at once; where that fails, on each alone, so that a fault stays with its own item."""
    if not items:
        return []
    try:
        return list(work(items))
    except Exception as fault:  # noqa: BLE001 - handed on as the item's answer
        if len(items) == 1:
            return [fault]
    return [_isolated(work, [item])[0] for item in items]
