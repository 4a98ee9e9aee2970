"""What engines over one artefact share: requests in, micro-batches of about equal length, answers in order."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import islice
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import torch

from lexmill.artifact import Artifact
from lexmill.data.batch import Example
from lexmill.engine.base import Cancelled, Expired, Request, Work
from lexmill.engine.loaded import Loaded
from lexmill.errors import UserError
from lexmill.tasks.base import Hear, Record, Task

CHUNK = 1024

T = TypeVar("T")


class Item(NamedTuple):
    """One record of a micro-batch, as tokens too; who hears its answer come into being."""

    example: Example
    record: Record
    adapter: str | None
    hear: Hear | None


class Runtime(ABC):
    """An `Engine` for one artefact. How a micro-batch is answered is the subclass's own, and so is its constructor,
    which takes `(source, *, file, device, token_budget, threads)`.

    Args:
        token_budget: most tokens of one micro-batch; an item longer than that runs alone.
    """

    runtime: ClassVar[str]
    """What manifests and `--engine` call it."""
    form: ClassVar[str | None] = None
    """The format of export that it runs; None where it runs the artefact's own model."""
    slow_to_open: ClassVar[bool] = False
    """Whether opening takes so long that it is for who asks for it."""
    packages: ClassVar[tuple[str, ...]] = ()
    """What it imports beside what Lexmill needs anyway."""

    def __init__(self, loaded: Loaded, token_budget: int) -> None:
        if token_budget < 1:
            raise ValueError(f"token_budget is {token_budget}, must be at least 1")
        self.name = loaded.name
        self._loaded = loaded
        self._token_budget = token_budget

    @abstractmethod
    def _forward(self, items: Sequence[Item]) -> list[Any]:
        """The answers to a micro-batch. Called under `torch.inference_mode`."""

    @classmethod
    def is_installed(cls) -> bool:
        """Whether what it needs is there."""
        return all(find_spec(name) is not None for name in cls.packages)

    @classmethod
    @abstractmethod
    def takes(cls, artifact: Artifact) -> bool:
        """Whether it could answer for an artefact, as far as its manifest and its files tell."""

    @property
    @abstractmethod
    def record(self) -> Mapping[str, Any]:
        """What computes the answers, as JSON: the `runtime` and its version, and what it says of how."""

    @torch.inference_mode()
    def _answer(self, items: Sequence[Item]) -> list[Any]:
        return self._forward(items)

    @property
    def task(self) -> Task:
        return self._loaded.task

    @property
    def adapters(self) -> Sequence[str]:
        return tuple(self._loaded.adapters)

    def task_for(self, adapter: str | None) -> Task:
        return self._loaded.of(adapter).task

    @property
    @abstractmethod
    def work(self) -> Work: ...

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
        def encode(some: Sequence[Record]) -> Sequence[Example]:
            for record in some:
                refuse_half_characters(record)
            return task.encode(some, self._loaded.tokenizer, labelled=labelled)

        return _isolated(encode, records)

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
            items = [
                Item(cast("Example", examples[i]), records[i], adapters[i], t) for i, t in zip(due, heard, strict=True)
            ]
            found = _isolated(self._answer, items)
            for i, answer in zip(due, found, strict=True):
                answers[i] = answer
        return answers


def refuse_half_characters(value: object) -> None:
    """Raise a `UserError` where a text in a record holds half of a surrogate pair, which JSON can spell and no
    tokenizer reads."""
    match value:
        case str():
            try:
                value.encode()
            except UnicodeEncodeError:
                hint = "\\ud800 to \\udfff stand for a character only in pairs"
                raise UserError("half of a surrogate pair is no text", hint=hint) from None
        case Mapping():
            for one in value.values():
                refuse_half_characters(one)
        case list() | tuple():
            for one in value:
                refuse_half_characters(one)
        case _:
            pass


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
