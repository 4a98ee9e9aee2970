"""What a method of compression is: one file that makes a model smaller or faster, and says what it did.

A new method is a subclass in its own file, decorated with `register`. The chain, the search and the verb know methods
only through this class.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np

from lexmill.config import load, read_sets
from lexmill.data.batch import Batch, collate
from lexmill.engine import Loaded
from lexmill.engine.runtime import micro_batches, num_tokens
from lexmill.errors import UserError
from lexmill.tasks import Record

Stage = Literal["vocabulary", "distil", "prune", "factorise", "exits", "sparsify", "quantise"]
"""The kinds of method. Steps of a chain come in any order that their `after` allows."""

_BETWEEN = re.compile(r",(?=[A-Za-z_][\w.]*=)")
"""What parts the settings of a step; a list has commas too."""


@dataclass(frozen=True)
class Material:
    """What methods work with beside the model.

    Args:
        teachers: the models that are to be matched; the first is the one that is compressed, as it was.
        train: labelled rows, to train and calibrate on.
        validation: labelled rows that choices inside a method are made on; never those that the proof is made on.
        unlabelled: further rows, without labels, that distillation may learn from.
        seed: fixes all that is drawn.
        note: is told in words what happens.
        progress: is told the share done of the step that runs, from 0 to 1.
    """

    teachers: Sequence[Loaded]
    train: Sequence[Record]
    validation: Sequence[Record]
    unlabelled: Sequence[Record] = ()
    seed: int = 0
    note: Callable[[str], None] = lambda line: None
    progress: Callable[[float], None] = lambda share: None

    def sample(self, rows: int) -> list[Record]:
        """So many training rows, drawn by the seed alone; all where there are fewer."""
        if rows >= len(self.train):
            return list(self.train)
        chosen = np.sort(np.random.default_rng(self.seed).permutation(len(self.train))[:rows])
        return [self.train[i] for i in chosen]


def batches(subject: Loaded, records: Sequence[Record], *, labelled: bool, token_budget: int = 2048) -> Iterator[Batch]:
    """Records as batches of about equal length, as the subject's task and tokenizer read them."""
    examples = subject.task.encode(records, subject.tokenizer, labelled=labelled)
    lengths = {index: num_tokens(example) for index, example in enumerate(examples)}
    for part in micro_batches(lengths, token_budget):
        yield collate([examples[index] for index in part])


class Method(ABC):
    """One way to make a model smaller or faster. It has no state: what is set is in its `Options`."""

    name: ClassVar[str]
    """The value of `method` in a step."""
    stage: ClassVar[Stage]
    Options: ClassVar[type]
    """A frozen dataclass: what a person may set."""
    after: ClassVar[Mapping[Stage, str]] = {}
    """The stages that it cannot follow, and why, in words that end 'since …'."""

    @abstractmethod
    def apply(self, subject: Loaded, material: Material, options: Any) -> tuple[Loaded, dict[str, float]]:
        """The compressed model, and what it did as numbers by name, such as `layers_removed` or `kernels_int8`.

        The subject's model is the chain's own and may be changed in place; its task and tokenizer may not.

        Raises:
            UserError: it cannot act on this model, or what is asked of it would do nothing.
        """

    def check(self, subject: Loaded, options: Any) -> None:
        """Raise the `UserError` of `apply` that needs no work to find, before a long chain begins."""
        return


@dataclass(frozen=True)
class Step:
    """One step of a chain: a method by name, and its options where they are not the defaults."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def read(self, where: str) -> tuple[Method, Any]:
        """The method and its options, checked. A `UserError` names `where`."""
        method = find(self.method)
        try:
            return method, load(method.Options, stored=dict(self.options)).value
        except UserError as error:
            raise UserError(error.message, where=f"{where} ({self.method})", hint=error.hint) from error


def read_step(text: str) -> dict[str, Any]:
    """`distil,layers=3,recovery.epochs=8` as the table of a step; see `config.load` for how values are written."""
    name, *settings = _BETWEEN.split(text)
    if "=" in name or not name:
        raise UserError("names no method", where=f"--step {text}", hint="write --step distil,layers=3")
    found: dict[str, Any] = {"method": name}
    for key, value in read_sets(settings).items():
        *tables, last = key.split(".")
        inner = found
        for table in tables:
            inner = inner.setdefault(table, {})
        inner[last] = value
    return found


def check_order(steps: Sequence[Step]) -> None:
    """Raise a `UserError` where a step cannot follow an earlier one, saying why."""
    seen: list[Method] = []
    for index, step in enumerate(steps):
        method = find(step.method)
        for earlier in seen:
            if earlier.stage in method.after:
                raise UserError(
                    f"'{method.name}' cannot follow '{earlier.name}': {method.after[earlier.stage]}",
                    where=f"steps[{index}]",
                    hint=f"put '{method.name}' before '{earlier.name}'",
                )
        seen.append(method)


_METHODS: dict[str, Method] = {}
M = TypeVar("M", bound=Method)


def register(method: type[M]) -> type[M]:
    """Class decorator: make a method known by its name."""
    _METHODS[method.name] = method()
    return method


def known() -> list[str]:
    """The names of the methods there are."""
    return sorted(_METHODS)


def find(name: str) -> Method:
    """The method of this name, or a `UserError` that lists the known ones."""
    if name not in _METHODS:
        raise UserError(f"unknown method '{name}'", hint=f"known methods: {', '.join(known())}")
    return _METHODS[name]
