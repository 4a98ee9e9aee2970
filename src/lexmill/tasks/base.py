"""What a task is: one file that takes examples to a `Batch`, a model's outputs to answers, and says its schema.

A new task is a subclass in its own file, decorated with `register`. `fit`, `evaluate`, `predict`, `serve` and `verify`
know tasks only through this class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import numpy as np
from jaxtyping import UInt64
from pydantic import BaseModel
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from lexmill.data.batch import Batch, Example
from lexmill.data.check import Finding
from lexmill.data.columns import TEXT_AND_LABEL, Role
from lexmill.errors import UserError
from lexmill.models import Model
from lexmill.tasks.inputs import Arrange, packed

Record = Mapping[str, Any]
"""One row of data, by column name."""

Hear = Callable[[str], bool]
"""Is told the next piece of an answer; False where nobody listens any more, and the answer may end."""


@dataclass(frozen=True)
class Metrics:
    """What an evaluation found.

    Args:
        values: by name, e.g. `accuracy`, `macro_f1`.
        intervals: 95 % confidence intervals for some of `values`.
        tables: rows for people and reports, e.g. `per_class`, `confused`.
    """

    values: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    tables: dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Wants:
    """What a task wants of its data.

    Args:
        labels: `class` where labels are names, which the data check counts and compares between files; `value` where
            they are not; `none` where label columns are passed over.
        label_columns: where the options name them; otherwise they are given or guessed.
        multi_label: a record may have several labels.
        max_tokens: longer texts are cut, and the data check says how many.
        apart: labels that no training row need have; validation rows must have each, and `calibrate` learns from them.
        regroups: training examples are not single records: `Task.regroup` makes them of several, or of parts.
    """

    labels: Literal["class", "value", "none"] = "class"
    label_columns: tuple[str, ...] = ()
    multi_label: bool = False
    max_tokens: int | None = None
    apart: tuple[str, ...] = ()
    regroups: bool = False


class Task(ABC):
    """One thing a model can be asked, e.g. `classify`. Final subclasses are frozen: state is set at construction."""

    roles: ClassVar[tuple[Role, ...]] = TEXT_AND_LABEL
    """The columns of its data. A row to be answered has those that are inputs."""
    name: ClassVar[str]
    """The verb of the route `POST /v1/{name}`, the value of `--task`, and the manifest's `task.name`."""
    Request: ClassVar[type[BaseModel]]
    """The body of one HTTP request: its first field is a list of items, the others are options for all of them."""
    Answer: ClassVar[type[BaseModel]]
    """What `render` gives for one item."""
    Options: ClassVar[type]
    """A frozen dataclass: what a person may set for this task (`[options]` in a recipe)."""
    evidence_field: ClassVar[str]
    """The field of a rendered answer that holds `evidence` where the request set `raw`."""
    metric: ClassVar[str]
    """The validation metric that picks the best epoch; higher is better unless `metric_sign` is -1."""
    metric_sign: ClassVar[int] = 1
    couples: ClassVar[bool] = False
    """Whether an example's loss depends on the others of its batch (contrastive). `item_losses` is then always given
    the outputs of the whole optimiser batch, one micro-batch after the other."""

    @classmethod
    @abstractmethod
    def wants(cls, options: Any) -> Wants:
        """What this task, with these `Options`, wants of its data."""

    @classmethod
    def defaults(cls, directory: Path) -> Mapping[str, Any]:
        """Values of `Options` that the files beside a pretrained model state; what a person sets goes before them."""
        return {}

    # --- construction: from training data, or from a manifest -------------------------------------------------
    @classmethod
    @abstractmethod
    def from_records(cls, records: Iterable[Record], columns: Mapping[str, str], options: Any) -> Self:
        """Learn what the task needs (its labels) from training records, read once in a stream.

        Args:
            columns: role (of `roles`) to column name.
            options: an instance of `Options`.

        Raises:
            UserError: where the records cannot train this task, e.g. with one class only.
        """

    def for_tokenizer(self, tokenizer: Tokenizer) -> Self:
        """This task, knowing what it must of its model's tokenizer, e.g. the id of a special token; `state` keeps it.
        Raises `UserError` where the tokenizer lacks it."""
        return self

    def before(self, model: Model, records: Iterator[Record], tokenizer: Tokenizer) -> Self:
        """This task, having asked the model that training starts from about all labelled rows, those of validation and
        test too, before the model changes. Most tasks have nothing to ask, and do not read the rows."""
        return self

    @classmethod
    @abstractmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """The inverse of `state`."""

    def inspect(self, rows: Iterator[tuple[str, Record]]) -> Iterator[Finding]:
        """What the labelled rows of one file show of this task, for people and the record; read once, before training.
        Most tasks have nothing to say, and do not read the rows.

        Args:
            rows: each with its place, `file:line`.

        Raises:
            UserError: a row that cannot be used.
        """
        return iter(())

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """All that `from_state` needs, as JSON; `columns` holds the column of each role."""

    @abstractmethod
    def labels(self) -> Mapping[str, Sequence[str]]:
        """By head, the names of its outputs in order; empty where they have none (a number, a vocabulary).

        A run that starts from an artefact of the same task goes on with the heads whose labels are equal.
        """

    # --- text to tokens ---------------------------------------------------------------------------------------
    @abstractmethod
    def encode(self, records: Sequence[Record], tokenizer: Tokenizer, *, labelled: bool) -> list[Example]:
        """Tokenize records. With `labelled`, their labels too; a label unknown to the task is a `UserError`."""

    def regroup(self, examples: Iterable[Example]) -> Iterator[Example]:
        """What is trained on in place of one example a record, e.g. texts run together and cut into blocks."""
        return iter(examples)

    def draw(self, batch: Batch, keys: UInt64[np.ndarray, "example"]) -> Batch:
        """The batch as it is trained on this time, where something of it is drawn anew each epoch, e.g. what is hidden.

        Args:
            keys: one an example: a function of the run's seed, the epoch and the example's index alone.
        """
        return batch

    @property
    def redraws(self) -> bool:
        """Whether `draw` gives the model other tokens from epoch to epoch, so that nothing can be kept of a text."""
        return False

    # --- the model --------------------------------------------------------------------------------------------
    @abstractmethod
    def attach(self, model: Model) -> None:
        """Add the heads this task needs and the model lacks, with new weights drawn from torch's generator."""

    @abstractmethod
    def forward(self, model: Model, batch: Batch, arrange: Arrange = packed) -> Mapping[str, Tensor]:
        """Outputs by head. `arrange` lays the streams out for the model: `packed`, or `dense` as the slow oracle."""

    @abstractmethod
    def item_weights(self, batch: Batch) -> Mapping[str, np.ndarray]:
        """Per head, the weight of each item's loss: 0 where a label is missing. Known before the forward pass."""

    @abstractmethod
    def item_losses(self, outputs: Mapping[str, Tensor], batch: Batch) -> Mapping[str, Tensor]:
        """Per head, the unreduced loss of each item, in the order of `item_weights`."""

    def shown(self, outputs: Mapping[str, Tensor], batch: Batch) -> Mapping[str, Tensor]:
        """Numbers of items of a batch in training, by name: their means over a run show what options did to losses."""
        return {}

    def divergence(self, outputs: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Per head and item, half the symmetric Kullback-Leibler divergence between two outputs of one batch, in nats.

        This one is for heads that give each item a distribution over their last dimension. A `UserError` elsewhere.
        """
        found: dict[str, Tensor] = {}
        for head, a in outputs.items():
            if a.dim() != 2 or a.shape[-1] < 2:
                raise UserError(f"the task '{self.name}' has no divergence", where="train.r_drop", hint="leave it out")
            p, q = a.log_softmax(-1), other[head].log_softmax(-1)
            found[head] = ((p.exp() - q.exp()) * (p - q)).sum(-1) / 2
        return found

    def imitation(
        self, outputs: Mapping[str, Tensor], wanted: Mapping[str, Tensor], temperature: float
    ) -> Mapping[str, Tensor]:
        """Per head and item, how far outputs are from those that a teacher gave, which have no gradient.

        This one is for heads that give each item a distribution over their last dimension: the Kullback-Leibler
        divergence of both at the temperature, in nats, times its square, so that gradients stay as large (Hinton et al.
        2015, section 2). A `UserError` elsewhere.
        """
        found: dict[str, Tensor] = {}
        for head, given in wanted.items():
            if given.dim() != 2 or given.shape[-1] < 2:
                raise UserError(f"the task '{self.name}' cannot be learnt from a teacher's answers")
            p, q = (given / temperature).log_softmax(-1), (outputs[head] / temperature).log_softmax(-1)
            found[head] = (p.exp() * (p - q)).sum(-1) * temperature**2
        return found

    def files(self, model: Model) -> Mapping[str, str]:
        """Further text files that other programs want beside the model's in an artefact, by relative path."""
        return {}

    def reading(self) -> dict[str, Any]:
        """What a program without Lexmill needs to know to cut texts and to make answers of outputs, as JSON; empty
        where that takes more than numbers and names."""
        return {}

    # --- answers ----------------------------------------------------------------------------------------------
    @abstractmethod
    def items(self, request: BaseModel) -> list[Record]:
        """The records that a request asks about, each carrying the request's options for it."""

    @abstractmethod
    def answer(self, model: Model, batch: Batch, records: Sequence[Record], tokenizer: Tokenizer) -> list[Any]:
        """One answer a record, of a type of the task's own. Called under `torch.inference_mode`."""

    def calibrate(self, answers: Sequence[Any], records: Sequence[Record]) -> tuple[Self, dict[str, float]]:
        """The task with what it learns from its answers to the validation rows once the model is trained, such as a
        threshold, and numbers for the record. Asked of a task whose `wants` names labels `apart`."""
        return self, {}

    def item_scores(self, answers: Sequence[Any], records: Sequence[Record]) -> np.ndarray | None:
        """How good each answer is by itself, higher being better, NaN where its record says nothing of that. 0 and 1
        alone mean wrong and right. None where answers are good or bad only together."""
        return None

    def speak(
        self,
        model: Model,
        batch: Batch,
        records: Sequence[Record],
        tokenizer: Tokenizer,
        hear: Sequence[Hear | None],
    ) -> list[Any]:
        """`answer`, telling who wants to hear it what an answer says while it comes into being.

        Args:
            hear: one a record; None where nobody listens.

        Raises:
            UserError: this task's answers come all at once.
        """
        raise UserError(f"the answers of '{self.name}' come all at once", where="stream", hint="leave it out")

    @abstractmethod
    def render(self, answer: Any, request: BaseModel | None = None) -> dict[str, Any]:
        """What a person or a caller sees of an answer: `predict` prints it, HTTP sends it. Holds `label` and `score`
        or the task's own answer. A request with `raw` set sees `evidence` as well."""

    @abstractmethod
    def evidence(self, answer: Any) -> dict[str, float]:
        """The numbers behind an answer, by name (`head/label` → logit): what `verify` compares. Never rounded."""

    def combine(self, answers: Sequence[Any]) -> Any:
        """One answer out of those that several models gave to one item. A `UserError` where this task has no mean."""
        raise UserError(f"answers of the task '{self.name}' cannot be combined", hint="ask one model alone")

    @abstractmethod
    def probe(self, texts: Sequence[str]) -> BaseModel:
        """A request with `raw` set, one item a text, for `verify`; a task on pairs gives each text the next as partner,
        the last one the first."""

    @abstractmethod
    def evaluate(self, answers: Sequence[Any], records: Sequence[Record]) -> Metrics:
        """Score answers against labelled records."""


def bernoulli_apart(outputs: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Of each logit, the divergence in `imitation` where it stands for a variable of its own, true or false."""
    p, q = wanted / temperature, outputs / temperature
    return (p.sigmoid() * (p - q) - F.softplus(p) + F.softplus(q)) * temperature**2


_REGISTRY: dict[str, type[Task]] = {}
T = TypeVar("T", bound=Task)


def register(task: type[T]) -> type[T]:
    """Class decorator: make a task known by its name."""
    _REGISTRY[task.name] = task
    return task


def known() -> list[str]:
    """The names of the tasks there are."""
    return sorted(_REGISTRY)


def find(name: str) -> type[Task]:
    """The task of this name, or a `UserError` that lists the known ones.

    A package of one's own makes its task known to every process by an entry point of the group `lexmill.tasks`.
    """
    if name not in _REGISTRY:
        for entry in entry_points(group="lexmill.tasks", name=name):
            entry.load()
    if name not in _REGISTRY:
        raise UserError(f"unknown task '{name}'", hint=f"known tasks: {', '.join(known())}")
    return _REGISTRY[name]
