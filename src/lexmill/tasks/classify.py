"""Text classification: one label, several labels, pairs of texts, or several heads over one trunk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from annotated_types import Ge, Gt, Lt
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from lexmill.data.batch import Batch, Example
from lexmill.data.check import labels_in
from lexmill.errors import UserError
from lexmill.models import Model
from lexmill.tasks import scope, scoring
from lexmill.tasks.base import Metrics, Record, Task, Wants, bernoulli_apart, register
from lexmill.tasks.inputs import Arrange, packed
from lexmill.tasks.smoothing import smoothing_cost
from lexmill.tasks.texts import text_in, tokens_of

MAX_LABELS = 10_000


@dataclass(frozen=True)
class ClassifyOptions:
    """What may be set for `classify`.

    Args:
        max_length: tokens a text (or pair) is cut to, special tokens included.
        multi_label: a record has any number of labels: a list, or a string with `|` between them.
        heads: label columns, each with a head of its own over one trunk; a record may lack some. Empty: the one
            label column.
        class_weights: `balanced` weighs a class by the inverse of its share (King and Zeng, 2001, as used by
            scikit-learn).
        label_smoothing: share of the label's probability that is spread over all labels (Szegedy et al. 2016); not
            with `multi_label`.
        threshold: with `multi_label`, the probability from which a label is given.
        out_of_scope: the label of rows that are none of the classes. Nothing is learnt from them in training; on the
            validation rows a threshold is chosen below which a text is given this label. For one head, one label.
        out_of_scope_by: how sure the model is: its largest `probability`, or the `energy` of its logits.
        out_of_scope_goal: what the threshold shall serve best: `balanced`, the mean of the shares of both kinds of rows
            that are treated rightly; `accuracy` over all rows; or `f1` of the rows out of scope.
    """

    max_length: Annotated[int, Ge(3)] = 128
    multi_label: bool = False
    heads: tuple[str, ...] = ()
    class_weights: Literal["none", "balanced"] = "none"
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    threshold: Annotated[float, Gt(0), Lt(1)] = 0.5
    out_of_scope: str | None = None
    out_of_scope_by: scope.Certainty = "probability"
    out_of_scope_goal: scope.Objective = "balanced"


@dataclass(frozen=True)
class Head:
    """One question asked of a text: the labels in the order of the logits, and the weight of each in the loss."""

    name: str
    column: str
    labels: tuple[str, ...]
    weights: tuple[float, ...]


class ClassifyRequest(BaseModel):
    """Texts to classify. An item is a text, or a list of two where the model was trained on pairs."""

    model_config = ConfigDict(extra="forbid")

    texts: list[str | list[str]] = Field(min_length=1, description="One text an item, or [text, text_pair].")
    top_k: int = Field(default=1, ge=1, description="How many labels to return, best first, where it is more than 1.")
    raw: bool = Field(default=False, description="Return the logit of every label too.")


class LabelScore(BaseModel):
    """A label and its probability."""

    label: str
    score: float


class ClassifyAnswer(BaseModel):
    """The answer to one text. With several heads, `label` and `score` stand under each head's name in `heads`."""

    label: str | None = None
    score: float | None = None
    labels: list[LabelScore] | None = Field(default=None, description="Multi-label, or top_k > 1.")
    out_of_scope: bool | None = Field(
        default=None, description="Where the model knows a limit; if true, `score` is that of the best label, refused."
    )
    heads: dict[str, ClassifyAnswer] | None = None
    logits: dict[str, float] | None = Field(default=None, description="With `raw`: head/label to logit.")


Logits = Mapping[str, np.ndarray]
"""The answer of this task inside the process: per head, the logit of every label, float32."""


@register
class Classify(Task):
    """Single-label, multi-label and multi-head classification of texts and pairs of texts."""

    name = "classify"
    Request = ClassifyRequest
    Answer = ClassifyAnswer
    Options = ClassifyOptions
    metric: ClassVar[str] = "accuracy"
    evidence_field: ClassVar[str] = "logits"

    def __init__(
        self, columns: Mapping[str, str], heads: Sequence[Head], options: ClassifyOptions, limit: float | None = None
    ) -> None:
        """`limit` is the certainty below which a text is out of scope; None where that was not learnt."""
        self.limit = limit
        self.columns = dict(columns)
        self.heads = {head.name: head for head in heads}
        self.options = options
        self._index = {head.name: {label: i for i, label in enumerate(head.labels)} for head in heads}

    # --- construction -----------------------------------------------------------------------------------------
    @classmethod
    def wants(cls, options: ClassifyOptions) -> Wants:
        apart = () if options.out_of_scope is None else (options.out_of_scope,)
        return Wants("class", options.heads, options.multi_label, options.max_length, apart)

    @classmethod
    def from_records(cls, records: Iterable[Record], columns: Mapping[str, str], options: ClassifyOptions) -> Self:
        if options.multi_label and options.label_smoothing:
            hint = "set one of the two"
            raise UserError("several labels a text are not smoothed", where="options.label_smoothing", hint=hint)
        if options.out_of_scope is not None and (options.multi_label or options.heads):
            hint = "leave it out, or classify with one label in one head"
            raise UserError("only one label of one head has a scope", where="options.out_of_scope", hint=hint)
        head_columns = options.heads or (columns.get("label", "label"),)
        counts: dict[str, Counter[str]] = {column: Counter() for column in head_columns}
        for record in records:
            for column, counter in counts.items():
                counter.update(_labels_of(record, column, multi=options.multi_label))
                counter.pop(options.out_of_scope or "", None)
        for column, counter in counts.items():
            if len(counter) < 2:
                found = f"only '{next(iter(counter))}'" if counter else "no label"
                raise UserError(
                    f"column '{column}' holds {found}; a classifier needs at least two classes",
                    hint="name the label column with --label",
                )
            if len(counter) > MAX_LABELS:
                raise UserError(
                    f"column '{column}' holds {len(counter)} distinct labels, more than {MAX_LABELS}",
                    hint="is this column free text? name the label column with --label",
                )
        names = head_columns if options.heads else ("label",)
        heads = [
            Head(name, column, tuple(sorted(counter)), _class_weights(counter, options.class_weights))
            for name, (column, counter) in zip(names, counts.items(), strict=True)
        ]
        return cls(columns, heads, options)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        heads = [
            Head(head["name"], head["column"], tuple(head["labels"]), tuple(head["weights"])) for head in state["heads"]
        ]
        options: dict[str, Any] = {**state["options"], "heads": tuple(state["options"]["heads"])}
        return cls(state["columns"], heads, ClassifyOptions(**options), state.get("limit"))

    def state(self) -> dict[str, Any]:
        return {
            "columns": self.columns,
            "heads": [
                {"name": h.name, "column": h.column, "labels": list(h.labels), "weights": list(h.weights)}
                for h in self.heads.values()
            ],
            "options": {**asdict(self.options), "heads": list(self.options.heads)},
            **({} if self.limit is None else {"limit": self.limit}),
        }

    def labels(self) -> Mapping[str, Sequence[str]]:
        return {head.name: head.labels for head in self.heads.values()}

    # --- text to tokens ---------------------------------------------------------------------------------------
    def encode(self, records: Sequence[Record], tokenizer: Tokenizer, *, labelled: bool) -> list[Example]:
        texts = [self._text(record) for record in records]
        tokens = tokens_of(texts, tokenizer, self.options.max_length, typed="text_pair" in self.columns)
        return [
            Example({"source": (one,)}, self._labels(record) if labelled else {})
            for record, one in zip(records, tokens, strict=True)
        ]

    def _text(self, record: Record) -> str | tuple[str, str]:
        text = text_in(record, self.columns["text"])
        if "text_pair" not in self.columns:
            return text
        return text, text_in(record, self.columns["text_pair"])

    def _labels(self, record: Record) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        for head in self.heads.values():
            given = _labels_of(record, head.column, multi=self.options.multi_label)
            if given and given[0] == self.options.out_of_scope:
                continue
            index = self._index[head.name]
            for label in given:
                if label not in index:
                    raise UserError(
                        f"label '{label}' of column '{head.column}' was not seen in training",
                        hint=f"known labels: {', '.join(head.labels[:10])}{', …' if len(head.labels) > 10 else ''}",
                    )
            if self.options.multi_label:
                if record.get(head.column) is not None:
                    target = np.zeros(len(head.labels), np.float32)
                    target[[index[label] for label in given]] = 1
                    found[head.name] = target
            elif given:
                found[head.name] = np.array(index[given[0]], np.int64)
        return found

    # --- the model --------------------------------------------------------------------------------------------
    def attach(self, model: Model) -> None:
        for head in self.heads.values():
            if head.name not in model.heads:
                model.add_classifier(head.name, len(head.labels))

    def forward(self, model: Model, batch: Batch, arrange: Arrange = packed) -> Mapping[str, Tensor]:
        ids, positions, types, layout = arrange(batch.streams["source"], model.device)
        return model(ids, positions, layout, types=types, heads=list(self.heads))

    def item_weights(self, batch: Batch) -> Mapping[str, np.ndarray]:
        weights: dict[str, np.ndarray] = {}
        for head in self.heads.values():
            by_class = np.array(head.weights, np.float32)
            labels = batch.labels[head.name]
            item = labels @ by_class / np.maximum(labels.sum(-1), 1) if self.options.multi_label else by_class[labels]
            if self.options.multi_label:
                item = np.where(labels.sum(-1) > 0, item, 1).astype(np.float32)
            weights[head.name] = np.where(batch.masks[head.name], item * batch.weight, 0).astype(np.float32)
        return weights

    def item_losses(self, outputs: Mapping[str, Tensor], batch: Batch) -> Mapping[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for name in self.heads:
            logits = outputs[name]
            target = torch.from_numpy(batch.labels[name]).to(logits.device)
            if self.options.multi_label:
                each = F.binary_cross_entropy_with_logits(logits, target.to(logits.dtype), reduction="none")
                losses[name] = each.mean(-1)
            else:
                losses[name] = F.cross_entropy(
                    logits, target, reduction="none", label_smoothing=self.options.label_smoothing
                )
        return losses

    def shown(self, outputs: Mapping[str, Tensor], batch: Batch) -> Mapping[str, Tensor]:
        """`smoothing_cost` of smoothed labels; `class_reweighing`, how far weights of classes are from 1."""
        found: dict[str, Tensor] = {}
        if share := self.options.label_smoothing:
            heads = [(outputs[name], torch.from_numpy(batch.labels[name])) for name in self.heads]
            found["smoothing_cost"] = torch.cat([smoothing_cost(o, said.to(o.device), share) for o, said in heads])
        if self.options.class_weights != "none":
            weights = [one[batch.masks[name]] for name, one in self.item_weights(batch).items()]
            found["class_reweighing"] = torch.from_numpy(np.abs(np.concatenate(weights) - 1))
        return found

    def divergence(self, outputs: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if not self.options.multi_label:
            return super().divergence(outputs, other)
        # Of a Bernoulli variable a label; the mean over labels, as the loss.
        return {
            head: ((a.sigmoid() - other[head].sigmoid()) * (a - other[head])).mean(-1) / 2
            for head, a in outputs.items()
        }

    def imitation(
        self, outputs: Mapping[str, Tensor], wanted: Mapping[str, Tensor], temperature: float
    ) -> Mapping[str, Tensor]:
        if not self.options.multi_label:
            return super().imitation(outputs, wanted, temperature)
        return {head: bernoulli_apart(outputs[head], given, temperature).mean(-1) for head, given in wanted.items()}

    def reading(self) -> dict[str, Any]:
        several, limit = self.options.multi_label, self.limit
        refusal = {"label": self.options.out_of_scope, "by": self.options.out_of_scope_by, "below": limit}
        return {
            "max_length": self.options.max_length,
            "pairs": "text_pair" in self.columns,
            "activation": "sigmoid" if several else "softmax",
            "labels": {head.name: list(head.labels) for head in self.heads.values()},
            **({"threshold": self.options.threshold} if several else {}),
            **({} if limit is None else {"out_of_scope": refusal}),
        }

    # --- answers ----------------------------------------------------------------------------------------------
    def items(self, request: BaseModel) -> list[Record]:
        assert isinstance(request, ClassifyRequest)
        return [self._record(item, where=f"texts[{i}]") for i, item in enumerate(request.texts)]

    def combine(self, answers: Sequence[Logits]) -> Logits:
        """The mean of the models' probabilities, as logits."""
        return {head: self._mean(np.stack([answer[head] for answer in answers])) for head in answers[0]}

    def _mean(self, logits: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(logits).double()
        if self.options.multi_label:
            return torch.logit(given.sigmoid().mean(0), eps=1e-12).float().numpy()
        return (given.log_softmax(-1).logsumexp(0) - np.log(len(logits))).float().numpy()

    def probe(self, texts: Sequence[str]) -> BaseModel:
        if "text_pair" not in self.columns:
            return ClassifyRequest(texts=list(texts), raw=True)
        return ClassifyRequest(texts=[list(pair) for pair in zip(texts, [*texts[1:], texts[0]], strict=True)], raw=True)

    def _record(self, item: str | list[str], where: str) -> Record:
        pair = "text_pair" in self.columns
        if pair and (isinstance(item, str) or len(item) != 2):
            raise UserError("this model classifies pairs of texts", where=where, hint='give ["first", "second"]')
        if not pair and not isinstance(item, str):
            raise UserError("this model classifies single texts", where=where, hint="give one string")
        if isinstance(item, str):
            return {self.columns["text"]: item}
        return {self.columns["text"]: item[0], self.columns["text_pair"]: item[1]}

    def answer(self, model: Model, batch: Batch, records: Sequence[Record], tokenizer: Tokenizer) -> list[Logits]:
        outputs = {name: logits.float().cpu().numpy() for name, logits in self.forward(model, batch).items()}
        return [{name: logits[i] for name, logits in outputs.items()} for i in range(len(records))]

    def render(self, answer: Logits, request: BaseModel | None = None) -> dict[str, Any]:
        request = request if isinstance(request, ClassifyRequest) else ClassifyRequest(texts=[""])
        by_head = {name: self._render_head(self.heads[name], logits, request) for name, logits in answer.items()}
        shown = by_head["label"] if list(by_head) == ["label"] else {"heads": by_head}
        return {**shown, "logits": self.evidence(answer)} if request.raw else shown

    def _render_head(self, head: Head, logits: np.ndarray, request: ClassifyRequest) -> dict[str, Any]:
        probabilities = self.probabilities(logits)
        order = np.argsort(-probabilities, kind="stable")
        ranked = [{"label": head.labels[i], "score": float(probabilities[i])} for i in order[: request.top_k]]
        if self.options.multi_label:
            given = [i for i in order if probabilities[i] >= self.options.threshold]
            return {"labels": [{"label": head.labels[i], "score": float(probabilities[i])} for i in given]}
        shown: dict[str, Any] = {**ranked[0], "labels": ranked} if request.top_k > 1 else dict(ranked[0])
        if self.limit is not None:
            refused = bool(self._certainty(logits) < self.limit)
            shown |= {"label": self.options.out_of_scope if refused else shown["label"], "out_of_scope": refused}
        return shown

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Softmax of logits `[..., label]`, or with `multi_label` a sigmoid of each."""
        if self.options.multi_label:
            return np.exp(-np.logaddexp(0, -logits))
        shifted = np.exp(logits - logits.max(-1, keepdims=True))
        return shifted / shifted.sum(-1, keepdims=True)

    def evidence(self, answer: Logits) -> dict[str, float]:
        return {
            f"{name}/{label}": float(logit)
            for name, logits in answer.items()
            for label, logit in zip(self.heads[name].labels, logits, strict=True)
        }

    def evaluate(self, answers: Sequence[Logits], records: Sequence[Record]) -> Metrics:
        labels = [self._labels(record) for record in records]
        found: dict[str, Metrics] = {}
        for name, head in self.heads.items():
            rows = [(a[name], label[name]) for a, label in zip(answers, labels, strict=True) if name in label]
            if not rows:
                if any(self._outside(record) for record in records):
                    hint = "give rows with labels too"
                    raise UserError("all rows are out of scope", where="options.out_of_scope", hint=hint)
                raise UserError(f"no record has a label in column '{head.column}'", hint="name it with --label")
            probabilities = self.probabilities(np.stack([logits for logits, _ in rows]))
            gold = np.stack([label for _, label in rows])
            if self.options.multi_label:
                found[name] = scoring.multi_label(probabilities, gold, head.labels, self.options.threshold)
            else:
                found[name] = scoring.single_label(probabilities, gold, head.labels)
        if self.options.out_of_scope is not None:
            return self._with_scope(found["label"], answers, records)
        return found["label"] if list(found) == ["label"] else scoring.combine(found)

    def item_scores(self, answers: Sequence[Logits], records: Sequence[Record]) -> np.ndarray:
        """The share of a record's heads that are right; with several labels a head is right or wrong as a whole."""
        each = [self._right(answer, record) for answer, record in zip(answers, records, strict=True)]
        return np.array([np.mean(right) if right else np.nan for right in each])

    def _right(self, answer: Logits, record: Record) -> list[bool]:
        if self._outside(record):
            return [self.limit is not None and bool(self._certainty(answer["label"]) < self.limit)]
        found: list[bool] = []
        for name, gold in self._labels(record).items():
            if self.options.multi_label:
                given = self.probabilities(answer[name]) >= self.options.threshold
                found.append(bool((given == (gold > 0)).all()))
            else:
                refused = self.limit is not None and bool(self._certainty(answer[name]) < self.limit)
                found.append(not refused and int(answer[name].argmax()) == int(gold))
        return found

    # --- out of scope -----------------------------------------------------------------------------------------
    def calibrate(self, answers: Sequence[Logits], records: Sequence[Record]) -> tuple[Self, dict[str, float]]:
        sure, right, inside = self._scope(answers, records)
        if inside.all() or not inside.any():
            what = f"all validation rows are {'in' if inside.all() else 'out of'} scope"
            raise UserError(what, where="options.out_of_scope", hint="give rows of both kinds with --validation")
        chosen = scope.choose(sure, right, inside, self.options.out_of_scope_goal)
        task = type(self)(self.columns, list(self.heads.values()), self.options, chosen.value)
        return task, {"out_of_scope_limit": chosen.value, "out_of_scope_goal": chosen.objective}

    def _with_scope(self, known: Metrics, answers: Sequence[Logits], records: Sequence[Record]) -> Metrics:
        values, intervals = scope.measure(*self._scope(answers, records), self.limit)
        return Metrics({**known.values, **values}, {**known.intervals, **intervals}, known.tables)

    def _scope(self, answers: Sequence[Logits], records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the labelled records: how sure the answer is, whether its best label is right, whether there is one."""
        rows: list[tuple[np.ndarray, int | None]] = []
        for answer, record in zip(answers, records, strict=True):
            label = self._labels(record).get("label")
            if label is not None or self._outside(record):
                rows.append((answer["label"], None if label is None else int(label)))
        logits = np.stack([one for one, _ in rows])
        gold = np.array([-1 if label is None else label for _, label in rows])
        return self._certainty(logits), logits.argmax(-1) == gold, gold >= 0

    def _outside(self, record: Record) -> bool:
        wanted = self.options.out_of_scope
        return wanted is not None and labels_in(record.get(self.heads["label"].column), multi=False) == [wanted]

    def _certainty(self, logits: np.ndarray) -> np.ndarray:
        return scope.certainty(logits, self.options.out_of_scope_by)


def _class_weights(counts: Counter[str], how: str) -> tuple[float, ...]:
    total = sum(counts.values())
    return tuple(total / (len(counts) * counts[label]) if how == "balanced" else 1.0 for label in sorted(counts))


def _labels_of(record: Record, column: str, *, multi: bool) -> list[str]:
    value = record.get(column)
    if isinstance(value, (list, tuple)) and not multi:
        raise UserError(
            f"a record has a list in column '{column}': {value!r}",
            hint="for several labels a record, give --set options.multi_label=true",
        )
    return labels_in(value, multi=multi)
