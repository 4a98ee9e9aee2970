"""Named entities and other labelled pieces of a text, by one tag a unit (sequence labelling)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Self, cast

import numpy as np
import torch
from annotated_types import Ge
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from lexmill import metrics
from lexmill.data.batch import IGNORE, Batch, Example
from lexmill.data.check import Finding
from lexmill.data.columns import TEXTS, Role
from lexmill.errors import UserError
from lexmill.models import Model
from lexmill.nn.layout import Dense
from lexmill.tasks import bio
from lexmill.tasks.base import Metrics, Record, Task, Wants, register
from lexmill.tasks.gold import SHAPES, Gold, gold_of, listed, on_units, sign_and_label
from lexmill.tasks.inputs import Arrange, packed
from lexmill.tasks.texts import text_in
from lexmill.tasks.units import Spans, is_by_character, join, stripped, units_of
from lexmill.tasks.windows import UnitWindow, windows_of_units

HEAD = "tags"
_EXAMPLES = 3


@dataclass(frozen=True)
class TagOptions:
    """What may be set for `tag`.

    Args:
        max_length: tokens of a window, special ones included.
        stride: tokens that a window of a longer text shares with the one before.
    """

    max_length: Annotated[int, Ge(3)] = 256
    stride: Annotated[int, Ge(0)] = 64


class TagRequest(BaseModel):
    """Texts to find entities in. An item is a text, or the list of its tokens."""

    model_config = ConfigDict(extra="forbid")

    texts: list[str | list[str]] = Field(min_length=1)
    raw: bool = Field(default=False, description="Return the logits of every unit too.")


class EntityReply(BaseModel):
    """Characters `start` to `end` of the text as it was sent."""

    text: str
    start: int
    end: int
    label: str
    score: float = Field(description="The mean, over its units, of the probability of their tags.")


class TagReply(BaseModel):
    """The entities of a text, in order; none overlaps another."""

    entities: list[EntityReply]
    text: str | None = Field(default=None, description="Where tokens were given: the text that they make.")
    logits: dict[str, float] | None = Field(default=None, description="With `raw`: unit/tag to logit.")


@dataclass(frozen=True)
class Tagged:
    """The answer of this task inside the process.

    Args:
        joined: whether the text was made of given tokens.
        spans: the units that the tokenizer keeps, as characters of the text.
        logits: of each of them, that of every tag.
    """

    text: str
    joined: bool
    spans: Spans
    logits: Float[np.ndarray, "unit tag"]


@register
class Tag(Task):
    """Finds the entities of a text of any length."""

    roles = (
        Role("text", ("tokens", "words", *TEXTS)),
        Role("tags", ("tags", "ner_tags", "entities", "spans"), input=False, required=False),
    )
    name = "tag"
    Request = TagRequest
    Answer = TagReply
    Options = TagOptions
    evidence_field: ClassVar[str] = "logits"
    metric = "f1"

    def __init__(
        self, columns: Mapping[str, str], types: Sequence[str], scheme: bio.Scheme, options: TagOptions
    ) -> None:
        self.columns = dict(columns)
        self.types = tuple(types)
        self.scheme: bio.Scheme = scheme
        self.options = options

    # --- construction -----------------------------------------------------------------------------------------
    @classmethod
    def wants(cls, options: TagOptions) -> Wants:
        return Wants(labels="value")

    @classmethod
    def from_records(cls, records: Iterable[Record], columns: Mapping[str, str], options: TagOptions) -> Self:
        """Learns the labels and the scheme: BIOES where a tag begins with E or S, BIO otherwise and for offsets."""
        if "tags" not in columns:
            raise UserError("no column holds the tags", hint="name it with --column tags=NAME")
        signs, types = set[str](), set[str]()
        for record in records:
            given = listed(record, columns["tags"])
            for sign, label in (sign_and_label(one) for one in given or ()):
                signs.add(sign)
                types.add(label)
        types.discard("")
        if not types:
            raise UserError(f"column '{columns['tags']}' names no entity", hint=SHAPES)
        return cls(columns, sorted(types), bio.scheme_of(signs), options)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        return cls(state["columns"], state["types"], state["scheme"], TagOptions(**state["options"]))

    def state(self) -> dict[str, Any]:
        return {
            "columns": self.columns,
            "types": list(self.types),
            "scheme": self.scheme,
            "options": asdict(self.options),
        }

    @cached_property
    def tags(self) -> tuple[str, ...]:
        """In the order of the logits."""
        signs = "BI" if self.scheme == "BIO" else "BIES"
        return (bio.OUTSIDE, *(f"{sign}-{label}" for label in self.types for sign in signs))

    def labels(self) -> Mapping[str, Sequence[str]]:
        return {HEAD: self.tags}

    def inspect(self, rows: Iterator[tuple[str, Record]]) -> Iterator[Finding]:
        """How many entities there are, which of them no sequence of units can say, and which tags make no entity."""
        count = 0
        lost: list[str] = []
        loose: list[str] = []
        for where, record in rows:
            gold = self._gold(record)
            if gold is not None:
                text, spans = self._read(record)
                count += len(gold.entities)
                lost += [f"{where}: '{text[one.start : one.end]}'" for one in on_units(gold, spans, self.scheme)[1]]
                loose += [f"{where}: '{text[one.start : one.end]}' as {one.label}" for one in gold.loose]
        yield Finding("info", "entities", f"{count:,} entities of {len(self.types)} labels", count)
        if lost:
            share = f"{len(lost):,} of {count:,} entities ({len(lost) / count:.2%})"
            message = f"{share} begin or end inside a word: they are not learnt, and cannot be found"
            yield Finding("warning", "unreachable_entities", message, len(lost), tuple(lost[:_EXAMPLES]))
        if loose:
            message = f"{len(loose):,} tags continue no entity ({self.scheme}): they are neither learnt nor counted"
            yield Finding("warning", "ill_formed_tags", message, len(loose), tuple(loose[:_EXAMPLES]))

    # --- records ----------------------------------------------------------------------------------------------
    def _text(self, record: Record) -> tuple[str, Spans | None]:
        """The text, and where its tokens stand where they are given."""
        given = record.get(self.columns["text"])
        if not isinstance(given, (list, tuple)):
            return text_in(record, self.columns["text"]), None
        tokens = cast("Sequence[Any]", given)
        if not tokens or not all(isinstance(token, str) and token for token in tokens):
            what = "an empty or strange token" if tokens else "no tokens"
            raise UserError(f"column '{self.columns['text']}' holds {what}", hint="give a list of texts, none empty")
        return join(tokens)

    def _read(self, record: Record) -> tuple[str, Spans]:
        """The text and its units: the tokens where they are given, unless that is by characters."""
        text, tokens = self._text(record)
        if tokens is None or is_by_character(record[self.columns["text"]]):
            return text, units_of(text)
        return text, stripped(text, tokens)

    def _gold(self, record: Record) -> Gold | None:
        """None where the record says nothing."""
        given = listed(record, self.columns["tags"])
        if given is None:
            return None
        gold = gold_of(given, *self._text(record), self.scheme)
        for one in (*gold.entities, *gold.loose):
            if one.label not in self.types:
                hint = f"it knows: {', '.join(self.types)}"
                raise UserError(f"the label '{one.label}' was not in the training data", hint=hint)
        return gold

    def _marks(self, spans: Spans, gold: Gold) -> Int[np.ndarray, "unit"]:
        """The index of the tag of each unit; `IGNORE` where that cannot be said."""
        index = {tag: i for i, tag in enumerate(self.tags)}
        tags = on_units(gold, spans, self.scheme)[0]
        return np.array([IGNORE if tag is None else index[tag] for tag in tags], np.int64)

    # --- text to tokens ---------------------------------------------------------------------------------------
    def encode(self, records: Sequence[Record], tokenizer: Tokenizer, *, labelled: bool) -> list[Example]:
        """The windows of each record. With `labelled`, the tag of each unit at its first token, in the one window where
        it has the most context."""
        examples: list[Example] = []
        for record, (_, _, spans, windows) in zip(records, self._cut(records, tokenizer), strict=True):
            labels: dict[str, np.ndarray] = {}
            gold = self._gold(record) if labelled else None
            if gold is not None:
                kept = np.sort(np.concatenate([one.units for one in windows]))
                marks = np.full(len(spans), IGNORE, np.int64)
                marks[kept] = self._marks(spans[kept], gold)
                parts = [np.full(len(one.tokens.ids), IGNORE, np.int64) for one in windows]
                for part, one in zip(parts, windows, strict=True):
                    part[one.rows] = marks[one.units]
                labels[HEAD] = np.concatenate(parts)
            examples.append(Example({"source": tuple(one.tokens for one in windows)}, token_labels=labels))
        return examples

    def _cut(self, records: Sequence[Record], tokenizer: Tokenizer) -> list[tuple[str, bool, Spans, list[UnitWindow]]]:
        """Of each record the text, whether it was made of tokens, its units, and its windows."""
        read = [self._read(record) for record in records]
        words = [[text[start:end] for start, end in spans.tolist()] for text, spans in read]
        windows = windows_of_units(words, tokenizer, self.options.max_length, self.options.stride)
        if any(not len(own[0].tokens.ids) for own in windows):
            raise UserError("a text holds nothing that this model's tokenizer can read", hint="leave it out")
        return [
            (text, not isinstance(record.get(self.columns["text"]), str), spans, own)
            for record, (text, spans), own in zip(records, read, windows, strict=True)
        ]

    # --- the model --------------------------------------------------------------------------------------------
    def attach(self, model: Model) -> None:
        if HEAD not in model.heads:
            model.add_token_classifier(HEAD, len(self.tags))

    def forward(self, model: Model, batch: Batch, arrange: Arrange = packed) -> Mapping[str, Tensor]:
        """The logits `[tok, tag]`."""
        ids, positions, types, layout = arrange(batch.streams["source"], model.device)
        out = model(ids, positions, layout, types=types, heads=[HEAD])[HEAD]
        return {HEAD: out[layout.mask] if isinstance(layout, Dense) else out}

    def item_weights(self, batch: Batch) -> Mapping[str, np.ndarray]:
        """One item a token, of its example's weight; 0 where it has no label."""
        if HEAD not in batch.labels:
            return {}
        stream = batch.streams["source"]
        own = np.repeat(batch.weight[stream.example], stream.lengths)
        return {HEAD: (own * batch.masks[HEAD]).astype(np.float32)}

    def item_losses(self, outputs: Mapping[str, Tensor], batch: Batch) -> Mapping[str, Tensor]:
        if HEAD not in batch.labels:
            return {}
        target = torch.from_numpy(batch.labels[HEAD]).to(outputs[HEAD].device)
        return {HEAD: F.cross_entropy(outputs[HEAD], target, reduction="none")}

    def reading(self) -> dict[str, Any]:
        o = self.options
        return {"max_length": o.max_length, "stride": o.stride, "pairs": False, "labels": {HEAD: list(self.tags)}}

    # --- answers ----------------------------------------------------------------------------------------------
    def items(self, request: BaseModel) -> list[Record]:
        assert isinstance(request, TagRequest)
        return [{self.columns["text"]: one} for one in request.texts]

    def probe(self, texts: Sequence[str]) -> BaseModel:
        return TagRequest(texts=list(texts), raw=True)

    def answer(self, model: Model, batch: Batch, records: Sequence[Record], tokenizer: Tokenizer) -> list[Tagged]:
        logits = self.forward(model, batch)[HEAD].float().cpu().numpy()
        tables = iter(np.split(logits, batch.streams["source"].offsets[1:-1]))
        return [
            self._gathered(text, joined, spans, windows, [next(tables) for _ in windows])
            for text, joined, spans, windows in self._cut(records, tokenizer)
        ]

    def _gathered(
        self, text: str, joined: bool, spans: Spans, windows: Sequence[UnitWindow], tables: Sequence[np.ndarray]
    ) -> Tagged:
        units = np.concatenate([one.units for one in windows])
        rows = np.concatenate([table[one.rows] for one, table in zip(windows, tables, strict=True)])
        order = np.argsort(units)
        return Tagged(text, joined, spans[units[order]], rows[order])

    def combine(self, answers: Sequence[Tagged]) -> Tagged:
        """The mean of the models' probabilities, as logits."""
        first = answers[0]
        if any(not np.array_equal(one.spans, first.spans) for one in answers):
            raise UserError("these models do not read the same units", hint="ask models of one tokenizer")
        logs = np.stack([_log_probabilities(one.logits) for one in answers])
        mean = np.logaddexp.reduce(logs, axis=0) - np.log(len(logs))
        return Tagged(first.text, first.joined, first.spans, mean.astype(np.float32))

    def entities(self, answer: Tagged) -> list[EntityReply]:
        """Those of the likeliest well-formed sequence of tags."""
        path = self._path(answer)
        logs = _log_probabilities(answer.logits)
        found: list[EntityReply] = []
        for first, last, label in bio.entities_in([self.tags[tag] for tag in path], self.scheme)[0]:
            start, end = int(answer.spans[first, 0]), int(answer.spans[last, 1])
            units = np.arange(first, last + 1)
            score = float(np.exp(logs[units, path[units]]).mean())
            found.append(EntityReply(text=answer.text[start:end], start=start, end=end, label=label, score=score))
        return found

    def _path(self, answer: Tagged) -> Int[np.ndarray, "unit"]:
        """The index of each unit's tag."""
        if not len(answer.spans):
            return np.zeros(0, np.int64)
        return bio.viterbi(_log_probabilities(answer.logits), self._allowed)

    @cached_property
    def _allowed(self) -> bio.Transitions:
        return bio.transitions(self.tags, self.scheme)

    def render(self, answer: Tagged, request: BaseModel | None = None) -> dict[str, Any]:
        shown: dict[str, Any] = {"entities": [one.model_dump() for one in self.entities(answer)]}
        if answer.joined:
            shown["text"] = answer.text
        raw = isinstance(request, TagRequest) and request.raw
        return {**shown, "logits": self.evidence(answer)} if raw else shown

    def evidence(self, answer: Tagged) -> dict[str, float]:
        return {
            f"{unit}/{tag}": value
            for unit, row in enumerate(answer.logits.tolist())
            for tag, value in zip(self.tags, row, strict=True)
        }

    # --- how good it is ---------------------------------------------------------------------------------------
    def evaluate(self, answers: Sequence[Tagged], records: Sequence[Record]) -> Metrics:
        """Entity `precision`, `recall` and `f1` over all labels, `per_class` by label, and `token_accuracy`, the share
        of units whose tag is right."""
        golds = map(self._gold, records)
        rows = [(answer, gold) for answer, gold in zip(answers, golds, strict=True) if gold is not None]
        if not rows:
            raise UserError(f"no record has tags in column '{self.columns['tags']}'", hint="name another column")
        each = [self._counts(answer, gold) for answer, gold in rows]
        right = np.array([self._right(answer, gold) for answer, gold in rows])
        tables = np.stack([np.stack([one.hit, one.support, one.predicted]) for one in each])
        counts = metrics.Counts(*tables.sum(0))
        values = {**metrics.entity_scores(counts), "token_accuracy": float(_share(right))}
        intervals = {
            name: metrics.bootstrap(lambda some, name=name: _entity_score(tables[some].sum(0), name), len(rows))
            for name in ("precision", "recall", "f1")
        }
        intervals["token_accuracy"] = metrics.bootstrap(lambda some: _share(right[some]), len(rows))
        return Metrics(values, intervals, {"per_class": metrics.per_class(counts, self.types)})

    def item_scores(self, answers: Sequence[Tagged], records: Sequence[Record]) -> np.ndarray:
        """The F1 of each text; 1 where there is rightly no entity."""
        found = np.full(len(records), np.nan)
        for i, (answer, gold) in enumerate(zip(answers, map(self._gold, records), strict=True)):
            if gold is not None:
                counts = self._counts(answer, gold)
                empty = not counts.support.sum() and not counts.predicted.sum()
                found[i] = 1.0 if empty else metrics.entity_scores(counts)["f1"]
        return found

    def _counts(self, answer: Tagged, gold: Gold) -> metrics.Counts:
        predicted = [(one.start, one.end, one.label) for one in self.entities(answer)]
        return metrics.count_entities(gold.entities, predicted, self.types)

    def _right(self, answer: Tagged, gold: Gold) -> tuple[int, int]:
        """How many units have the right tag, and of how many that can be said."""
        marks = self._marks(answer.spans, gold)
        return int((self._path(answer) == marks).sum()), int((marks != IGNORE).sum())


def _log_probabilities(logits: Float[np.ndarray, "unit tag"]) -> Float[np.ndarray, "unit tag"]:
    logs = logits.astype(np.float64)
    return logs - np.logaddexp.reduce(logs, axis=-1, keepdims=True)


def _share(right: Int[np.ndarray, "text 2"]) -> float:
    hits, total = right.sum(0)
    return float(hits / total) if total else 0.0


def _entity_score(table: Int[np.ndarray, "3 label"], name: str) -> float:
    return metrics.entity_scores(metrics.Counts(*table))[name]
