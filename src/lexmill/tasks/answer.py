"""Extractive question answering: the span of a context that answers a question, or that there is none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import torch
from annotated_types import Ge
from jaxtyping import Float, Int
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer
from torch import Tensor

from lexmill import metrics
from lexmill.data.batch import IGNORE, Batch, Example
from lexmill.data.check import Finding
from lexmill.data.columns import Role
from lexmill.errors import UserError
from lexmill.models import Model
from lexmill.nn.layout import Dense
from lexmill.tasks.base import Metrics, Record, Task, Wants, register
from lexmill.tasks.inputs import Arrange, packed
from lexmill.tasks.texts import text_in
from lexmill.tasks.windows import Window, places_of, windows_of

HEAD = "span"
ENDS = ("start", "end")
_EXAMPLES = 3


@dataclass(frozen=True)
class AnswerOptions:
    """What may be set for `answer`.

    Args:
        max_length: tokens of a window: the question, a piece of the context, and special ones.
        stride: tokens of the context that a window shares with the one before.
        max_answer_length: tokens of the longest answer that is given.
        no_answer_threshold: no answer is given where that there is none is likelier than the best span by more than
            this, in nats; None for an answer always.
    """

    max_length: Annotated[int, Ge(8)] = 384
    stride: Annotated[int, Ge(0)] = 128
    max_answer_length: Annotated[int, Ge(1)] = 64
    no_answer_threshold: float | None = None


class Question(BaseModel):
    """A question, and the text that answers it."""

    model_config = ConfigDict(extra="forbid")

    question: str
    context: str


class AnswerRequest(BaseModel):
    """Questions with their contexts."""

    model_config = ConfigDict(extra="forbid")

    items: list[Question] = Field(min_length=1)
    raw: bool = Field(default=False, description="Return the logits of every token of every window too.")


class AnswerReply(BaseModel):
    """The answer, empty where there is none: characters `start` to `end` of the context as it was sent."""

    answer: str
    start: int
    end: int
    score: float = Field(description="Probability of the start times that of the end, in the window they stand in.")
    logits: dict[str, float] | None = Field(default=None, description="With `raw`: start|end/window/token to logit.")


@dataclass(frozen=True)
class Found:
    """An answer; `logits` hold start and end of every token, a table a window."""

    text: str
    start: int
    end: int
    score: float
    logits: tuple[Float[np.ndarray, "tok 2"], ...]


@register
class Answer(Task):
    """Finds the answer to a question in a context of any length."""

    roles = (
        Role("question", ("question", "query", "问题")),
        Role("context", ("context", "passage", "document", "paragraph", "文本")),
        Role("answers", ("answers", "answer"), input=False, required=False),
    )
    name = "answer"
    Request = AnswerRequest
    Answer = AnswerReply
    Options = AnswerOptions
    evidence_field: ClassVar[str] = "logits"
    metric = "f1"

    def __init__(self, columns: Mapping[str, str], options: AnswerOptions) -> None:
        self.columns = dict(columns)
        self.options = options
        self._tokenizer: Tokenizer | None = None

    # --- construction -----------------------------------------------------------------------------------------
    @classmethod
    def wants(cls, options: AnswerOptions) -> Wants:
        return Wants(labels="value")

    @classmethod
    def from_records(cls, records: Iterable[Record], columns: Mapping[str, str], options: AnswerOptions) -> Self:
        if "answers" not in columns:
            raise UserError("no column holds the answers", hint="name it with --column answers=NAME")
        return cls(columns, options)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        return cls(state["columns"], AnswerOptions(**state["options"]))

    def state(self) -> dict[str, Any]:
        return {"columns": self.columns, "options": asdict(self.options)}

    def for_tokenizer(self, tokenizer: Tokenizer) -> Self:
        task = type(self)(self.columns, self.options)
        task._tokenizer = tokenizer
        return task

    def inspect(self, rows: Iterator[tuple[str, Record]]) -> Iterator[Finding]:
        """How many answers are so long that no window holds them."""
        assert self._tokenizer is not None
        count, lost = 0, list[str]()
        for where, record in rows:
            answers = self._answers(record)
            count += bool(answers)
            # Windows share `stride` tokens, so that only a longer answer may stand in none.
            if not answers or len(answers[0][1].encode()) <= self.options.stride:
                continue
            start, text = answers[0]
            if not any(places_of(self._windows([record], self._tokenizer)[0], start, start + len(text))):
                lost.append(f"{where}: '{text[:40]}…'")
        if lost:
            share = f"{len(lost):,} of {count:,} answers ({len(lost) / count:.2%})"
            message = f"{share} are longer than what windows share: they are not learnt, and cannot be found whole"
            yield Finding("warning", "unreachable_answers", message, len(lost), tuple(lost[:_EXAMPLES]))

    def labels(self) -> Mapping[str, Sequence[str]]:
        return {HEAD: ()}

    # --- text to tokens ---------------------------------------------------------------------------------------
    def encode(self, records: Sequence[Record], tokenizer: Tokenizer, *, labelled: bool) -> list[Example]:
        """The windows of each record. With `labelled`, 1 at the token of each window that its first answer starts or
        ends at; at the window's first token where it does not hold the answer. An answer that no window holds is not
        learnt from."""
        examples: list[Example] = []
        for record, windows in zip(records, self._windows(records, tokenizer), strict=True):
            answers = self._answers(record) if labelled else None
            labels = {} if answers is None else _marks(windows, answers[0] if answers else None)
            examples.append(Example({"source": tuple(one.tokens for one in windows)}, token_labels=labels))
        return examples

    def _windows(self, records: Sequence[Record], tokenizer: Tokenizer) -> list[list[Window]]:
        pairs = [tuple(text_in(record, self.columns[role]) for role in ("question", "context")) for record in records]
        return windows_of([(one[0], one[1]) for one in pairs], tokenizer, self.options.max_length, self.options.stride)

    def _answers(self, record: Record) -> list[tuple[int, str]] | None:
        """(start, text) of each answer; none where the record says that there is none, None where it says nothing."""
        given = record.get(self.columns["answers"])
        if given is None:
            return None
        column, context = self.columns["answers"], text_in(record, self.columns["context"])
        hint = 'an answer is {"text": …, "start": …}, with start counted in characters of the context'
        try:
            if isinstance(given, Mapping):
                found = list(zip(map(int, given["answer_start"]), map(str, given["text"]), strict=True))
            else:
                found = [(int(one["start"]), str(one["text"])) for one in given]
        except (KeyError, TypeError, ValueError):
            raise UserError(f"column '{column}' holds no list of answers", hint=hint) from None
        for start, text in found:
            if not text or start < 0 or context[start : start + len(text)] != text:
                raise UserError(f"the answer '{text[:60]}' does not stand at character {start}", hint=hint)
        return found

    # --- the model --------------------------------------------------------------------------------------------
    def attach(self, model: Model) -> None:
        if HEAD not in model.heads:
            model.add_span_head(HEAD)

    def forward(self, model: Model, batch: Batch, arrange: Arrange = packed) -> Mapping[str, Tensor]:
        """The logits `[tok]` of `start` and of `end`."""
        ids, positions, types, layout = arrange(batch.streams["source"], model.device)
        out = model(ids, positions, layout, types=types, heads=[HEAD])[HEAD]
        rows = out[layout.mask] if isinstance(layout, Dense) else out
        return dict(zip(ENDS, rows.unbind(-1), strict=True))

    def item_weights(self, batch: Batch) -> Mapping[str, np.ndarray]:
        """One item a window, of its example's whole weight; 0 where the example has no label."""
        stream = batch.streams["source"]
        own = batch.weight[stream.example]
        return {end: (own * _marked(batch, end)).astype(np.float32) for end in ENDS if end in batch.labels}

    def item_losses(self, outputs: Mapping[str, Tensor], batch: Batch) -> Mapping[str, Tensor]:
        """Per window, the negative log-probability of its marked token among all its tokens."""
        stream = batch.streams["source"]
        owner = torch.from_numpy(np.repeat(np.arange(len(stream.lengths)), stream.lengths)).to(outputs["start"].device)
        found: dict[str, Tensor] = {}
        for end in ENDS:
            if end in batch.labels:
                mark = torch.from_numpy(batch.masks[end]).to(outputs[end])
                total = log_normalisers(outputs[end], owner, len(stream.lengths))
                found[end] = total - torch.zeros_like(total).index_add(0, owner, outputs[end] * mark)
        return found

    # --- answers ----------------------------------------------------------------------------------------------
    def items(self, request: BaseModel) -> list[Record]:
        assert isinstance(request, AnswerRequest)
        return [{self.columns["question"]: one.question, self.columns["context"]: one.context} for one in request.items]

    def probe(self, texts: Sequence[str]) -> BaseModel:
        """Each text is a context; its question is the beginning of the next."""
        pairs = zip(texts, [*texts[1:], texts[0]], strict=True)
        return AnswerRequest(items=[Question(question=other[:16], context=text) for text, other in pairs], raw=True)

    def answer(self, model: Model, batch: Batch, records: Sequence[Record], tokenizer: Tokenizer) -> list[Found]:
        outputs = self.forward(model, batch)
        logits = torch.stack([outputs[end] for end in ENDS], -1).float().cpu().numpy()
        tables = iter(np.split(logits, batch.streams["source"].offsets[1:-1]))
        return [
            self.best(windows, [next(tables) for _ in windows], text_in(record, self.columns["context"]))
            for record, windows in zip(records, self._windows(records, tokenizer), strict=True)
        ]

    def best(self, windows: Sequence[Window], logits: Sequence[Float[np.ndarray, "tok 2"]], context: str) -> Found:
        """The likeliest span of all windows; none where every window says so by more than the threshold."""
        nothing, best, span = np.inf, -np.inf, (0, 0)
        for window, table in zip(windows, logits, strict=True):
            logs = table.astype(np.float64)
            logs -= np.logaddexp.reduce(logs, axis=0)
            nothing = min(nothing, float(logs[0].sum()))
            if len(window.rows):
                value, first, last = best_span(logs[window.rows], self.options.max_answer_length)
                if value > best:
                    best, span = value, (int(window.spans[first, 0]), int(window.spans[last, 1]))
        threshold = self.options.no_answer_threshold
        if best == -np.inf or (threshold is not None and nothing - best > threshold):
            return Found("", 0, 0, float(np.exp(nothing)), tuple(logits))
        return Found(context[slice(*span)], *span, float(np.exp(best)), tuple(logits))

    def render(self, answer: Found, request: BaseModel | None = None) -> dict[str, Any]:
        shown = {"answer": answer.text, "start": answer.start, "end": answer.end, "score": answer.score}
        raw = isinstance(request, AnswerRequest) and request.raw
        return {**shown, "logits": self.evidence(answer)} if raw else shown

    def evidence(self, answer: Found) -> dict[str, float]:
        return {
            f"{end}/{w}/{t}": value
            for w, table in enumerate(answer.logits)
            for end, column in zip(ENDS, table.T.tolist(), strict=True)
            for t, value in enumerate(column)
        }

    # --- how good it is ---------------------------------------------------------------------------------------
    def evaluate(self, answers: Sequence[Found], records: Sequence[Record]) -> Metrics:
        """`exact_match` and `f1`; `no_answer_accuracy` too where rows have no answer: how often it is seen whether a
        question has one."""
        golds = [self._answers(record) for record in records]
        there = [(answer, gold) for answer, gold in zip(answers, golds, strict=True) if gold is not None]
        if not there:
            raise UserError(f"no record has answers in column '{self.columns['answers']}'", hint="name another column")
        scores = self._scores(answers, golds, records)
        each = {"exact_match": scores[:, 0], "f1": scores[:, 1]}
        if any(not gold for _, gold in there):
            each["no_answer_accuracy"] = np.array([bool(gold) == bool(answer.text) for answer, gold in there], float)
        return Metrics(
            {name: float(values.mean()) for name, values in each.items()},
            {name: metrics.mean_interval(values) for name, values in each.items()},
            {},
        )

    def item_scores(self, answers: Sequence[Found], records: Sequence[Record]) -> np.ndarray:
        """The F1 of each."""
        golds = [self._answers(record) for record in records]
        found = np.full(len(records), np.nan)
        found[[gold is not None for gold in golds]] = self._scores(answers, golds, records)[:, 1]
        return found

    def _scores(
        self, answers: Sequence[Found], golds: Sequence[list[tuple[int, str]] | None], records: Sequence[Record]
    ) -> Float[np.ndarray, "labelled 2"]:
        """Exact match and F1 of each labelled record; Chinese rules where the questions are mostly Chinese."""
        chinese = metrics.mostly_chinese([text_in(one, self.columns["question"]) for one in records[:1000]])
        return np.array(
            [
                metrics.answer_scores(answer.text, [text for _, text in gold], chinese=chinese)
                for answer, gold in zip(answers, golds, strict=True)
                if gold is not None
            ]
        ).reshape(-1, 2)


def _marks(windows: Sequence[Window], answer: tuple[int, str] | None) -> dict[str, Int[np.ndarray, "tok"]]:
    """By head, 1 at one token of each window, `IGNORE` elsewhere; at all tokens where no window holds the answer."""
    held: list[tuple[int, int] | None] = [None for _ in windows]
    if answer is not None:
        held = places_of(windows, answer[0], answer[0] + len(answer[1]))
        if not any(held):
            nothing = np.full(sum(len(window.tokens.ids) for window in windows), IGNORE, np.int64)
            return {end: nothing.copy() for end in ENDS}
    found: dict[str, np.ndarray] = {}
    for side, end in enumerate(ENDS):
        parts = [np.full(len(window.tokens.ids), IGNORE, np.int64) for window in windows]
        for part, place in zip(parts, held, strict=True):
            part[0 if place is None else place[side]] = 1
        found[end] = np.concatenate(parts)
    return found


def _marked(batch: Batch, end: str) -> np.ndarray:
    """Which windows have a label."""
    return np.logical_or.reduceat(batch.masks[end], batch.streams["source"].offsets[:-1])


def log_normalisers(logits: Float[Tensor, "tok"], owner: Int[Tensor, "tok"], count: int) -> Float[Tensor, "seq"]:
    """The logarithm of the sum of the exponentials of each sequence's logits; `owner` is the sequence of each row."""
    most = logits.detach().new_full((count,), -torch.inf).scatter_reduce(0, owner, logits.detach(), "amax")
    return most + torch.zeros_like(most).index_add(0, owner, (logits - most[owner]).exp()).log()


def best_span(logs: Float[np.ndarray, "piece 2"], longest: int) -> tuple[float, int, int]:
    """The sum, the first and the last token of the best span of at most `longest` tokens; the earliest of equals."""
    sums = logs[:, :1] + logs[None, :, 1] + np.where(_reachable(len(logs), longest), 0, -np.inf)
    first, last = divmod(int(sums.argmax()), len(logs))
    return float(sums[first, last]), first, last


def _reachable(count: int, longest: int) -> np.ndarray:
    ahead = np.arange(count)[None, :] - np.arange(count)[:, None]
    return (ahead >= 0) & (ahead < longest)
