"""Embeddings: one vector a text, near to those of texts that mean the same or answer it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from lexmill import metrics
from lexmill.data.batch import Batch, Example, Stream
from lexmill.data.columns import TEXTS, Role
from lexmill.errors import UserError
from lexmill.models import Model
from lexmill.nn.pooling import Pooling
from lexmill.tasks import sentence_files
from lexmill.tasks.base import Metrics, Record, Task, Wants, register
from lexmill.tasks.inputs import Arrange, packed
from lexmill.tasks.texts import number_in, text_in, tokens_of

KIND = "embed_as"
"""The key of a record that says which prefix its text gets."""
HEAD = "embedding"
Kind = Literal["query", "passage"]


@dataclass(frozen=True)
class EmbedOptions:
    """What may be set for `embed`. A directory that sentence-transformers can load states its own defaults.

    Args:
        max_length: tokens a text is cut to, special tokens included.
        pooling: the vector of a text: the mean over its tokens, or that of the first or last one.
        normalise: whether answers have length 1.
        dimensions: sizes at which the first numbers of a vector alone shall serve too (Kusupati et al. 2022); the loss
            is the mean over these sizes and the whole.
        temperature: what similarities are divided by in the loss.
        query_prefix, passage_prefix: put before texts and before their pairs; before both texts where pairs have
            scores, the query's. The e5 models need `query: ` and `passage: `.
    """

    max_length: Annotated[int, Ge(3)] = 256
    pooling: Pooling = "mean"
    normalise: bool = True
    dimensions: tuple[Annotated[int, Ge(1)], ...] = ()
    temperature: Annotated[float, Gt(0), Le(10)] = 0.05
    query_prefix: str = ""
    passage_prefix: str = ""


class EmbedRequest(BaseModel):
    """Texts to embed."""

    model_config = ConfigDict(extra="forbid")

    texts: list[str] = Field(min_length=1)
    kind: Kind = Field(default="query", description="Which of the model's prefixes the texts get, where it has any.")
    dimension: int | None = Field(default=None, ge=1, description="One the model was trained for; default: all of it.")
    raw: bool = Field(default=False, description="Return the numbers of the whole vector by index too.")


class EmbedAnswer(BaseModel):
    """The vector of one text."""

    embedding: list[float]
    values: dict[str, float] | None = Field(default=None, description="With `raw`: index to number.")


Vectors = Float[np.ndarray, "seq dim"]
"""The answer of this task inside the process: the vector of the text, then those of its pair and negatives."""


@register
class Embed(Task):
    """One vector a text, learnt from pairs that belong together, or from pairs with scores."""

    roles = (
        Role("text", TEXTS, shape="text"),
        Role("text_pair", ("answer", "passage", "positive", "response", "document"), input=False),
        Role("score", ("score", "similarity_score", "similarity", "label"), input=False, required=False),
        Role("negatives", ("negatives", "negative"), input=False, required=False),
    )
    name = "embed"
    Request = EmbedRequest
    Answer = EmbedAnswer
    Options = EmbedOptions
    evidence_field: ClassVar[str] = "values"
    couples: ClassVar[bool] = True

    def __init__(self, columns: Mapping[str, str], options: EmbedOptions) -> None:
        self.columns = dict(columns)
        self.options = options

    @property
    def metric(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]  (it depends on the data)
        """Spearman's correlation where pairs have scores, else the mean reciprocal rank."""
        return "spearman" if "score" in self.columns else "mrr"

    # --- construction -----------------------------------------------------------------------------------------
    @classmethod
    def wants(cls, options: EmbedOptions) -> Wants:
        return Wants(labels="value", max_tokens=options.max_length)

    @classmethod
    def defaults(cls, directory: Path) -> Mapping[str, Any]:
        return sentence_files.read(directory)

    @classmethod
    def from_records(cls, records: Iterable[Record], columns: Mapping[str, str], options: EmbedOptions) -> Self:
        if "score" in columns and "negatives" in columns:
            hint = "leave one of the two columns out of the data"
            raise UserError("pairs with scores have no use for negatives", where="columns", hint=hint)
        if "score" in columns:
            scores = [s for record in records if (s := number_in(record, columns["score"])) is not None]
            if len(scores) > 1 and len(set(scores)) == 1:
                hint = "give pairs of several scores, or pairs that belong together without any"
                raise UserError(f"column '{columns['score']}' holds only {scores[0]:g}", hint=hint)
        return cls(columns, options)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        options: dict[str, Any] = {**state["options"], "dimensions": tuple(state["options"]["dimensions"])}
        return cls(state["columns"], EmbedOptions(**options))

    def state(self) -> dict[str, Any]:
        options = {**asdict(self.options), "dimensions": list(self.options.dimensions)}
        return {"columns": self.columns, "options": options}

    def labels(self) -> Mapping[str, Sequence[str]]:
        return {}

    # --- text to tokens ---------------------------------------------------------------------------------------
    def encode(self, records: Sequence[Record], tokenizer: Tokenizer, *, labelled: bool) -> list[Example]:
        texts = [self._texts(record, labelled=labelled) for record in records]
        flat = iter(tokens_of([text for one in texts for text in one], tokenizer, self.options.max_length, typed=False))
        examples: list[Example] = []
        for record, one in zip(records, texts, strict=True):
            score = number_in(record, self.columns["score"]) if labelled and "score" in self.columns else None
            labels = {} if score is None else {HEAD: np.array(score, np.float32)}
            examples.append(Example({"source": tuple(next(flat) for _ in one)}, labels))
        return examples

    def _texts(self, record: Record, *, labelled: bool) -> list[str]:
        """The text, and in training its pair and its negatives, each with its prefix."""
        query, passage = self.options.query_prefix, self.options.passage_prefix
        own = text_in(record, self.columns["text"])
        if not labelled:
            return [(passage if record.get(KIND) == "passage" else query) + own]
        pair = text_in(record, self.columns["text_pair"])
        if "score" in self.columns:
            return [query + own, query + pair]
        return [query + own, *(passage + text for text in (pair, *self.negatives(record)))]

    def negatives(self, record: Record) -> list[str]:
        """The wrong answers that a record holds."""
        given = record.get(self.columns["negatives"]) if "negatives" in self.columns else None
        found = [given] if isinstance(given, str) else list(given or ())
        return [str(text) for text in found if text]

    # --- the model --------------------------------------------------------------------------------------------
    def attach(self, model: Model) -> None:
        size = model.config.hidden_size
        for wanted in self.options.dimensions:
            if wanted >= size:
                raise UserError(
                    f"{wanted} is no part of a vector of {size}",
                    where="options.dimensions",
                    hint=f"give sizes below {size}",
                )

    def files(self, model: Model) -> Mapping[str, str]:
        o = self.options
        return sentence_files.written(
            model.config.hidden_size,
            pooling=o.pooling,
            normalise=o.normalise,
            max_length=o.max_length,
            query_prefix=o.query_prefix,
            passage_prefix=o.passage_prefix,
        )

    def forward(self, model: Model, batch: Batch, arrange: Arrange = packed) -> Mapping[str, Tensor]:
        """The vector `[seq, dim]` of every text, of any length."""
        ids, positions, types, layout = arrange(batch.streams["source"], model.device)
        return {HEAD: model.pooled(ids, positions, layout, types=types, how=self.options.pooling)}

    def item_weights(self, batch: Batch) -> Mapping[str, np.ndarray]:
        if "score" not in self.columns:
            return {HEAD: batch.weight}
        there = batch.masks.get(HEAD, np.zeros(batch.num_examples, bool))
        return {HEAD: np.where(there, batch.weight, 0).astype(np.float32)}

    def item_losses(self, outputs: Mapping[str, Tensor], batch: Batch) -> Mapping[str, Tensor]:
        vectors, stream = outputs[HEAD], batch.streams["source"]
        first = torch.from_numpy(_first(stream)).to(vectors.device)
        losses: list[Tensor] = []
        for size in (*self.options.dimensions, vectors.shape[-1]):
            unit = F.normalize(vectors[:, :size], dim=-1)
            if "score" in self.columns:
                score = torch.from_numpy(batch.labels[HEAD]).to(unit)
                there = torch.from_numpy(batch.masks[HEAD]).to(unit.device)
                losses.append(
                    ordered_loss((unit[first] * unit[first + 1]).sum(-1), score, there, self.options.temperature)
                )
            else:
                losses.append(contrastive_loss(unit, first, _identities(stream), self.options.temperature))
        return {HEAD: torch.stack(losses).mean(0)}

    def imitation(
        self, outputs: Mapping[str, Tensor], wanted: Mapping[str, Tensor], temperature: float
    ) -> Mapping[str, Tensor]:
        """One less the cosine of the two vectors of a text; the temperature plays no part."""
        if outputs[HEAD].shape != wanted[HEAD].shape:
            raise UserError(f"vectors of {outputs[HEAD].shape[-1]} numbers cannot be compared with the teacher's")
        return {HEAD: 1 - F.cosine_similarity(outputs[HEAD], wanted[HEAD], dim=-1)}

    def reading(self) -> dict[str, Any]:
        o = self.options
        prefixes = {"query": o.query_prefix, "passage": o.passage_prefix}
        return {"max_length": o.max_length, "pairs": False, "normalise": o.normalise, "prefixes": prefixes}

    # --- answers ----------------------------------------------------------------------------------------------
    def items(self, request: BaseModel) -> list[Record]:
        assert isinstance(request, EmbedRequest)
        return [{self.columns["text"]: text, KIND: request.kind} for text in request.texts]

    def probe(self, texts: Sequence[str]) -> BaseModel:
        return EmbedRequest(texts=list(texts), raw=True)

    def answer(self, model: Model, batch: Batch, records: Sequence[Record], tokenizer: Tokenizer) -> list[Vectors]:
        vectors = self.forward(model, batch)[HEAD].float()
        found = (F.normalize(vectors, dim=-1) if self.options.normalise else vectors).cpu().numpy()
        return np.split(found, _first(batch.streams["source"])[1:])

    def render(self, answer: Vectors, request: BaseModel | None = None) -> dict[str, Any]:
        request = request if isinstance(request, EmbedRequest) else EmbedRequest(texts=[""])
        shown = {HEAD: self._cut(answer[0], request.dimension).tolist()}
        return {**shown, "values": self.evidence(answer)} if request.raw else shown

    def _cut(self, vector: Float[np.ndarray, "dim"], dimension: int | None) -> Float[np.ndarray, "some"]:
        if dimension is None or dimension == len(vector):
            return vector
        if dimension not in self.options.dimensions:
            known = ", ".join(map(str, (*self.options.dimensions, len(vector))))
            raise UserError(f"not trained for vectors of {dimension}", where="dimension", hint=f"trained for: {known}")
        part = vector[:dimension]
        return part / max(float(np.linalg.norm(part)), 1e-12) if self.options.normalise else part

    def evidence(self, answer: Vectors) -> dict[str, float]:
        return {str(i): value for i, value in enumerate(answer[0].tolist())}

    # --- how good it is ---------------------------------------------------------------------------------------
    def evaluate(self, answers: Sequence[Vectors], records: Sequence[Record]) -> Metrics:
        if "score" in self.columns:
            cosine, gold = self._cosines(answers, records)
            both = {"spearman": metrics.spearman, "pearson": metrics.pearson}
            return Metrics(
                {name: statistic(cosine, gold) for name, statistic in both.items()},
                {
                    name: metrics.bootstrap(lambda rows, of=statistic: of(cosine[rows], gold[rows]), len(gold))
                    for name, statistic in both.items()
                },
                {},
            )
        ranks = self._ranks(answers, records)
        each = {"mrr": 1 / ranks, **{f"recall@{k}": (ranks <= k).astype(np.float64) for k in (1, 5, 10)}}
        return Metrics(
            {name: float(one.mean()) for name, one in each.items()},
            {name: metrics.mean_interval(one) for name, one in each.items()},
            {"missed": self._missed(ranks, records)},
        )

    def item_scores(self, answers: Sequence[Vectors], records: Sequence[Record]) -> np.ndarray:
        """One over the rank of a text's own pair; where pairs have scores, what each adds to Spearman's correlation."""
        if "score" not in self.columns:
            return 1 / self._ranks(answers, records)
        there = [number_in(record, self.columns["score"]) is not None for record in records]
        cosine, gold = self._cosines(answers, records)
        found = np.full(len(records), np.nan)
        found[there] = metrics.products(metrics.ranks(cosine), metrics.ranks(gold))
        return found

    def _cosines(self, answers: Sequence[Vectors], records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
        """Of the pairs that have a score, the cosine and the score."""
        scores = [number_in(record, self.columns["score"]) for record in records]
        there = [i for i, score in enumerate(scores) if score is not None]
        if not there:
            raise UserError(f"no record has a score in column '{self.columns['score']}'")
        first, second = (_unit(np.stack([answers[i][k] for i in there])) for k in (0, 1))
        return (first * second).sum(-1), np.array([scores[i] for i in there], np.float64)

    def _ranks(self, answers: Sequence[Vectors], records: Sequence[Record]) -> Int[np.ndarray, "record"]:
        """The rank of each text's own pair among all pairs and negatives of these records."""
        places: dict[str, int] = {}
        vectors: list[np.ndarray] = []
        own: list[int] = []
        for answer, record in zip(answers, records, strict=True):
            texts = self._texts(record, labelled=True)[1:]
            for text, vector in zip(texts, answer[1:], strict=True):
                if text not in places:
                    places[text] = len(vectors)
                    vectors.append(vector)
            own.append(places[texts[0]])
        queries = np.array([text_in(record, self.columns["text"]) for record in records])
        same = np.unique(queries, return_inverse=True)[1]
        return metrics.own_ranks(
            _unit(np.stack([a[0] for a in answers])), _unit(np.stack(vectors)), np.array(own), same
        )

    def _missed(self, ranks: np.ndarray, records: Sequence[Record]) -> list[dict[str, Any]]:
        """The texts whose pairs were found last."""
        worst = [int(i) for i in np.argsort(-ranks, kind="stable")[:20] if ranks[i] > 1]
        columns = {role: self.columns[role] for role in ("text", "text_pair")}
        return [{**{r: records[i][c] for r, c in columns.items()}, "rank": int(ranks[i])} for i in worst]


def contrastive_loss(
    unit: Float[Tensor, "seq dim"], first: Int[Tensor, "item"], same: Int[np.ndarray, "seq"], temperature: float
) -> Float[Tensor, "item"]:
    """How surely each text finds its own pair among the pairs and negatives of all (InfoNCE, van den Oord et al. 2018).

    Args:
        unit: vectors of length 1; those of an item follow each other: its text, its pair, its negatives.
        first: where each item begins.
        same: equal for equal texts; a copy of a text's own pair is not held against it.
    """
    others = torch.ones(len(unit), dtype=torch.bool, device=unit.device)
    others[first] = False
    rows = others.nonzero().flatten()
    own = torch.searchsorted(rows, first + 1)
    identity = torch.from_numpy(same).to(unit.device)
    copies = identity[first + 1, None] == identity[rows]
    copies[torch.arange(len(own), device=unit.device), own] = False
    logits = (unit[first] @ unit[rows].T / temperature).masked_fill(copies, float("-inf"))
    return F.cross_entropy(logits, own, reduction="none")


def ordered_loss(
    cosine: Float[Tensor, "item"], score: Float[Tensor, "item"], there: Tensor, temperature: float
) -> Float[Tensor, "item"]:
    """Pairs of higher score shall have the higher cosine (CoSENT, Su 2022): log(1 + Σ exp((cos j - cos i) / t)) over
    all i, j with a higher score of i. One number for the batch, the same for each item."""
    wrong = (cosine[None, :] - cosine[:, None])[(score[:, None] > score[None, :]) & there[:, None] & there[None, :]]
    return torch.logsumexp(torch.cat([wrong.new_zeros(1), wrong / temperature]), 0).expand(len(cosine))


def _first(stream: Stream) -> Int[np.ndarray, "item"]:
    """The first sequence of each example."""
    return np.flatnonzero(np.diff(stream.example, prepend=-1))


def _identities(stream: Stream) -> Int[np.ndarray, "seq"]:
    """A number a sequence, equal for equal tokens."""
    known: dict[bytes, int] = {}
    parts = np.split(stream.ids, stream.offsets[1:-1])
    return np.array([known.setdefault(part.tobytes(), len(known)) for part in parts])


def _unit(vectors: Float[np.ndarray, "row dim"]) -> Float[np.ndarray, "row dim"]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
