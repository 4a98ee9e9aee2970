"""Ranking: how well the second text of a pair answers, repeats or follows from the first, as one number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Self, cast

import numpy as np
import torch
from annotated_types import Ge
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from lexmill import metrics
from lexmill.data.batch import Batch, Example
from lexmill.data.columns import TEXTS, Role
from lexmill.errors import UserError
from lexmill.models import Model
from lexmill.tasks.base import Metrics, Record, Task, Wants, bernoulli_apart, register
from lexmill.tasks.inputs import Arrange, packed
from lexmill.tasks.texts import number_in, text_in, tokens_of

HEAD = "rank"


@dataclass(frozen=True)
class RankOptions:
    """What may be set for `rank`.

    Args:
        max_length: tokens a pair is cut to, special tokens included.
    """

    max_length: Annotated[int, Ge(5)] = 128


class Candidates(BaseModel):
    """A text and those to be ranked against it."""

    model_config = ConfigDict(extra="forbid")

    query: str
    candidates: list[str] = Field(min_length=1, max_length=1000)


class RankRequest(BaseModel):
    """Queries with their candidates, or plain pairs of texts."""

    model_config = ConfigDict(extra="forbid")

    items: list[Candidates | list[str]] = Field(min_length=1, description="{query, candidates}, or [first, second].")
    top_k: int | None = Field(default=None, ge=1, description="How many candidates to return; default: all.")
    raw: bool = Field(default=False, description="Return every candidate's logit by index too.")


class Ranked(BaseModel):
    """A candidate, its place in the request, and its score from 0 to 1."""

    index: int
    text: str
    score: float


class RankAnswer(BaseModel):
    """The score of a pair, or the candidates of a query, best first."""

    score: float | None = None
    ranking: list[Ranked] | None = None
    logits: dict[str, float] | None = Field(default=None, description="With `raw`: index to logit.")


@dataclass(frozen=True)
class Scores:
    """The logit of every candidate, float32, in the order given; no `candidates` where the item was a plain pair."""

    logits: Float[np.ndarray, "candidate"]
    candidates: tuple[str, ...] | None


@register
class Rank(Task):
    """Scores pairs of texts, read together, and ranks candidates by them."""

    roles = (
        Role("text", TEXTS, shape="text"),
        Role("text_pair", ("answer", "passage", "document", "candidate")),
        Role("label", ("label", "score", "relevance", "similarity"), input=False, required=False, shape="label"),
        Role("group", ("group", "qid", "query_id"), input=False, required=False),
    )
    name = "rank"
    Request = RankRequest
    Answer = RankAnswer
    Options = RankOptions
    evidence_field: ClassVar[str] = "logits"

    def __init__(
        self, columns: Mapping[str, str], low: float, high: float, *, graded: bool, options: RankOptions
    ) -> None:
        self.columns = dict(columns)
        self.low, self.high, self.graded = low, high, graded
        self.options = options

    @property
    def metric(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]  (it depends on the data)
        """Spearman's correlation where labels are graded, else average precision."""
        return "spearman" if self.graded else "average_precision"

    # --- construction -----------------------------------------------------------------------------------------
    @classmethod
    def wants(cls, options: RankOptions) -> Wants:
        return Wants(labels="value", max_tokens=options.max_length)

    @classmethod
    def from_records(cls, records: Iterable[Record], columns: Mapping[str, str], options: RankOptions) -> Self:
        """Learns the range of the labels; two distinct ones are no and yes, more are grades."""
        if "label" not in columns:
            raise UserError("no column says how good a pair is", hint="name it with --label")
        seen: set[float] = set()
        for record in records:
            value = number_in(record, columns["label"])
            if value is not None:
                # Three are enough to know the range, and that there are more than two.
                seen = seen | {value} if len(seen) < 3 else {min(*seen, value), sorted(seen)[1], max(*seen, value)}
        if len(seen) < 2:
            found = f"only {next(iter(seen))}" if seen else "no number"
            hint = "give pairs that fit and pairs that do not"
            raise UserError(f"column '{columns['label']}' holds {found}", hint=hint)
        return cls(columns, min(seen), max(seen), graded=len(seen) > 2, options=options)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        options = RankOptions(**state["options"])
        return cls(state["columns"], state["low"], state["high"], graded=state["graded"], options=options)

    def state(self) -> dict[str, Any]:
        learnt = {"low": self.low, "high": self.high, "graded": self.graded}
        return {"columns": self.columns, **learnt, "options": asdict(self.options)}

    def labels(self) -> Mapping[str, Sequence[str]]:
        return {HEAD: ()}

    # --- text to tokens ---------------------------------------------------------------------------------------
    def encode(self, records: Sequence[Record], tokenizer: Tokenizer, *, labelled: bool) -> list[Example]:
        pairs = [self._pairs(record) for record in records]
        flat = iter(tokens_of([pair for one in pairs for pair in one], tokenizer, self.options.max_length, typed=True))
        examples: list[Example] = []
        for record, one in zip(records, pairs, strict=True):
            target = self._target(record) if labelled else None
            labels = {} if target is None else {HEAD: np.array(target, np.float32)}
            examples.append(Example({"source": tuple(next(flat) for _ in one)}, labels))
        return examples

    def _pairs(self, record: Record) -> list[tuple[str, str]]:
        """A record's text with its pair, or with each where it holds a list of candidates."""
        query, given = text_in(record, self.columns["text"]), record.get(self.columns["text_pair"])
        if isinstance(given, (list, tuple)):
            return [(query, str(candidate)) for candidate in cast("Sequence[Any]", given)]
        return [(query, text_in(record, self.columns["text_pair"]))]

    def _target(self, record: Record) -> float | None:
        """The label as a share of the range seen in training, from 0 to 1."""
        column = self.columns["label"]
        value = number_in(record, column)
        if value is None:
            return None
        if isinstance(record.get(self.columns["text_pair"]), (list, tuple)):
            raise UserError("a row to learn from has one pair, not a list of candidates", hint="give a row a pair")
        if not self.low <= value <= self.high or (not self.graded and value not in (self.low, self.high)):
            hint = f"training had labels from {self.low:g} to {self.high:g}"
            raise UserError(f"the label {value:g} of column '{column}' was not seen in training", hint=hint)
        return (value - self.low) / (self.high - self.low)

    # --- the model --------------------------------------------------------------------------------------------
    def attach(self, model: Model) -> None:
        if HEAD not in model.heads:
            model.add_classifier(HEAD, 1)

    def forward(self, model: Model, batch: Batch, arrange: Arrange = packed) -> Mapping[str, Tensor]:
        """The logit `[seq]` of every pair."""
        ids, positions, types, layout = arrange(batch.streams["source"], model.device)
        return {HEAD: model(ids, positions, layout, types=types, heads=[HEAD])[HEAD].squeeze(-1)}

    def item_weights(self, batch: Batch) -> Mapping[str, np.ndarray]:
        return {HEAD: np.where(batch.masks[HEAD], batch.weight, 0).astype(np.float32)}

    def item_losses(self, outputs: Mapping[str, Tensor], batch: Batch) -> Mapping[str, Tensor]:
        target = torch.from_numpy(batch.labels[HEAD]).to(outputs[HEAD])
        return {HEAD: F.binary_cross_entropy_with_logits(outputs[HEAD], target, reduction="none")}

    def imitation(
        self, outputs: Mapping[str, Tensor], wanted: Mapping[str, Tensor], temperature: float
    ) -> Mapping[str, Tensor]:
        return {HEAD: bernoulli_apart(outputs[HEAD], wanted[HEAD], temperature)}

    def reading(self) -> dict[str, Any]:
        learnt = {"low": self.low, "high": self.high}
        return {"max_length": self.options.max_length, "pairs": True, "activation": "sigmoid", **learnt}

    # --- answers ----------------------------------------------------------------------------------------------
    def items(self, request: BaseModel) -> list[Record]:
        assert isinstance(request, RankRequest)
        return [self._record(item, where=f"items[{i}]") for i, item in enumerate(request.items)]

    def _record(self, item: Candidates | list[str], where: str) -> Record:
        if isinstance(item, Candidates):
            return {self.columns["text"]: item.query, self.columns["text_pair"]: item.candidates}
        if len(item) != 2:
            hint = 'give ["first", "second"], or {"query": …, "candidates": […]}'
            raise UserError(f"a pair of {len(item)} texts", where=where, hint=hint)
        return {self.columns["text"]: item[0], self.columns["text_pair"]: item[1]}

    def probe(self, texts: Sequence[str]) -> BaseModel:
        return RankRequest(items=[list(pair) for pair in zip(texts, [*texts[1:], texts[0]], strict=True)], raw=True)

    def answer(self, model: Model, batch: Batch, records: Sequence[Record], tokenizer: Tokenizer) -> list[Scores]:
        logits = self.forward(model, batch)[HEAD].float().cpu().numpy()
        cuts = np.cumsum(np.bincount(batch.streams["source"].example, minlength=len(records)))[:-1]
        found: list[Scores] = []
        for record, own in zip(records, np.split(logits, cuts), strict=True):
            given = record[self.columns["text_pair"]]
            found.append(Scores(own, tuple(map(str, given)) if isinstance(given, (list, tuple)) else None))
        return found

    def render(self, answer: Scores, request: BaseModel | None = None) -> dict[str, Any]:
        request = request if isinstance(request, RankRequest) else RankRequest(items=[["", ""]])
        scores = _sigmoid(answer.logits)
        if answer.candidates is None:
            shown: dict[str, Any] = {"score": float(scores[0])}
        else:
            order = np.argsort(-answer.logits, kind="stable")[: request.top_k]
            ranked = [{"index": int(i), "text": answer.candidates[i], "score": float(scores[i])} for i in order]
            shown = {"ranking": ranked}
        return {**shown, "logits": self.evidence(answer)} if request.raw else shown

    def evidence(self, answer: Scores) -> dict[str, float]:
        return {str(i): value for i, value in enumerate(answer.logits.tolist())}

    # --- how good it is ---------------------------------------------------------------------------------------
    def evaluate(self, answers: Sequence[Scores], records: Sequence[Record]) -> Metrics:
        targets = [self._target(record) for record in records]
        there = [i for i, target in enumerate(targets) if target is not None]
        if not there:
            raise UserError(f"no record has a label in column '{self.columns['label']}'", hint="name it with --label")
        gold = np.array([targets[i] for i in there], np.float64)
        scores = np.array([answers[i].logits[0] for i in there], np.float64)
        found = _graded(gold, scores) if self.graded else _binary(gold > 0.5, scores)
        if "group" in self.columns:
            groups = np.array([str(records[i].get(self.columns["group"])) for i in there])
            grouped = _within_groups(gold, scores, groups)
            found = Metrics({**found.values, **grouped.values}, {**found.intervals, **grouped.intervals}, found.tables)
        return found

    def item_scores(self, answers: Sequence[Scores], records: Sequence[Record]) -> np.ndarray:
        """Whether no or yes is right; where labels are graded, the squared error of the share, negative."""
        targets = np.array([np.nan if (t := self._target(record)) is None else t for record in records])
        share = _sigmoid(np.array([answer.logits[0] for answer in answers]))
        if self.graded:
            return -np.square(share - targets)
        return np.where(np.isnan(targets), np.nan, (share > 0.5) == (targets > 0.5))


def _graded(gold: Float[np.ndarray, "item"], scores: Float[np.ndarray, "item"]) -> Metrics:
    both = {"spearman": metrics.spearman, "pearson": metrics.pearson}
    return Metrics(
        {name: statistic(scores, gold) for name, statistic in both.items()},
        {
            name: metrics.bootstrap(lambda rows, of=statistic: of(scores[rows], gold[rows]), len(gold))
            for name, statistic in both.items()
        },
        {},
    )


def _binary(gold: np.ndarray, scores: Float[np.ndarray, "item"]) -> Metrics:
    if gold.all() or not gold.any():
        hint = "give pairs that fit and pairs that do not"
        raise UserError(f"all labelled pairs {'fit' if gold.all() else 'fail to fit'}", hint=hint)
    predicted = scores > 0
    counts = metrics.count(gold.astype(np.int64), predicted.astype(np.int64), 2)
    positive = metrics.per_class(counts, ("no", "yes"))
    values = {"accuracy": float((predicted == gold).mean()), "f1": float(positive[1]["f1"])}
    intervals = {"accuracy": metrics.accuracy_interval(predicted == gold)}
    for name, statistic in (("roc_auc", metrics.roc_auc), ("average_precision", metrics.average_precision)):
        whole = values[name] = statistic(gold, scores)
        intervals[name] = metrics.bootstrap(
            # A resample with one class only says nothing new.
            lambda rows, of=statistic, whole=whole: whole if gold[rows].std() == 0 else of(gold[rows], scores[rows]),
            len(gold),
        )
    return Metrics(values, intervals, {"per_class": positive})


def _within_groups(gold: Float[np.ndarray, "item"], scores: Float[np.ndarray, "item"], groups: np.ndarray) -> Metrics:
    """Of the groups in which something fits: how early the best comes, and how good the order is."""
    own = [rows for rows in metrics.by_group(groups) if (gold[rows] > 0).any()]
    if not own:
        raise UserError("no group holds a pair that fits", hint="leave the column of groups out")
    each = {
        "mrr": np.array([metrics.reciprocal_rank(gold[rows] >= gold[rows].max(), scores[rows]) for rows in own]),
        "ndcg@10": np.array([metrics.ndcg(gold[rows], scores[rows]) for rows in own]),
    }
    return Metrics(
        {name: float(one.mean()) for name, one in each.items()},
        {name: metrics.mean_interval(one) for name, one in each.items()},
        {},
    )


def _sigmoid(logits: Float[np.ndarray, "candidate"]) -> Float[np.ndarray, "candidate"]:
    return np.exp(-np.logaddexp(0, -logits))
