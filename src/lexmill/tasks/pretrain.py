"""Language modelling on running text, from new weights or from pretrained ones: causal, of masked tokens, of spans."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from annotated_types import Ge, Gt, Lt
from jaxtyping import UInt64
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer
from torch import Tensor

from lexmill import metrics
from lexmill.data.batch import Batch, Example, Stream, Tokens, pack
from lexmill.data.blocks import run_together, side_by_side
from lexmill.data.columns import TEXTS, Role
from lexmill.data.draws import keys as keyed
from lexmill.data.masking import Masking, corrupt_spans, num_spans
from lexmill.errors import UserError
from lexmill.models import LMHead, Model
from lexmill.nn.layout import Dense
from lexmill.tasks.base import Metrics, Record, Task, Wants, register
from lexmill.tasks.inputs import Arrange, packed
from lexmill.tasks.special_tokens import Known

_SCORED_AT_ONCE = 4096
"""Tokens of one forward pass where long texts are scored."""
_ENCODED_AT_ONCE = 1 << 20
"""Characters that are tokenized at once."""

Objective = Literal["causal", "masked", "span"]


@dataclass(frozen=True)
class PretrainOptions:
    """What may be set for `pretrain`.

    Args:
        objective: `causal`, each token from those before it; `masked`, hidden tokens from all others (Devlin et al.
            2019); `span`, spans that were taken out (Raffel et al. 2020, section 3.1.4), for an encoder-decoder.
        max_length: tokens a block: texts are run together and cut into these. Long texts are scored in as many.
        documents: `joined`, the tokens of a block see all texts in it; `separate`, those of their own text only.
        mask_share: with `masked` and `span`, the share of tokens that is hidden, anew each epoch.
        mean_span: with `span`, tokens a span in the mean.
        whole_words: with `masked`, words are hidden whole.
        end_token: the token between texts. Default: the first of the usual ones that the tokenizer knows.
    """

    objective: Objective = "causal"
    max_length: Annotated[int, Ge(4)] = 256
    documents: Literal["joined", "separate"] = "joined"
    mask_share: Annotated[float, Gt(0), Lt(1)] = 0.15
    mean_span: Annotated[float, Ge(1)] = 3.0
    whole_words: bool = False
    end_token: str | None = None


class PretrainRequest(BaseModel):
    """Texts to score."""

    model_config = ConfigDict(extra="forbid")

    texts: list[str] = Field(min_length=1)
    raw: bool = Field(default=False, description="Return the unrounded sum of the loss too.")


class PretrainAnswer(BaseModel):
    """How well the model foresees a text."""

    loss: float = Field(description="Nats a scored token, in the mean.")
    perplexity: float
    bits_per_byte: float | None = Field(default=None, description="Of the text in UTF-8; causal models only.")
    tokens: int = Field(description="Tokens scored: all, or those that were hidden, sentinels of spans among them.")
    evidence: dict[str, float] | None = Field(default=None, description="With `raw`.")


@dataclass(frozen=True)
class Score:
    """The negative log-likelihood (nats) and the number of scored tokens of each window of a text, and the text's bytes
    in UTF-8."""

    nll: np.ndarray
    tokens: np.ndarray
    bytes: int

    @property
    def loss(self) -> float:
        return float(self.nll.sum() / max(self.tokens.sum(), 1))

    @property
    def bits_per_byte(self) -> float:
        return float(self.nll.sum()) / math.log(2) / max(self.bytes, 1)


@register
class Pretrain(Task):
    """Learns running text; answers how well it foresees one."""

    roles = (Role("text", TEXTS, shape="text"),)
    name = "pretrain"
    Request = PretrainRequest
    Answer = PretrainAnswer
    Options = PretrainOptions
    metric: ClassVar[str] = "loss"
    metric_sign: ClassVar[int] = -1
    evidence_field: ClassVar[str] = "evidence"

    def __init__(self, columns: Mapping[str, str], options: PretrainOptions, known: Known | None = None) -> None:
        self.columns = dict(columns)
        self.options = options
        self._known = known

    @classmethod
    def wants(cls, options: PretrainOptions) -> Wants:
        return Wants(labels="none", regroups=True)

    @classmethod
    def from_records(cls, records: Iterable[Record], columns: Mapping[str, str], options: PretrainOptions) -> Self:
        if options.objective != "masked" and (options.whole_words or _is_set(options, "mask_share", but="span")):
            raise UserError("nothing is masked", where="options.objective", hint='set objective = "masked"')
        if _is_set(options, "mean_span", but="span"):
            raise UserError("no spans are taken out", where="options.mean_span", hint='set objective = "span"')
        return cls({"text": columns["text"]}, options)

    def for_tokenizer(self, tokenizer: Tokenizer) -> Self:
        options = self.options
        spans = (
            num_spans(options.max_length, options.mask_share, options.mean_span) if options.objective == "span" else 0
        )
        known = Known.of(tokenizer, end_token=options.end_token, masks=options.objective == "masked", spans=spans)
        return type(self)(self.columns, options, known)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        known: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in state["known"].items()}
        return cls(state["columns"], PretrainOptions(**state["options"]), Known(**known))

    def state(self) -> dict[str, Any]:
        known = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self.known).items()}
        return {"columns": self.columns, "options": asdict(self.options), "known": known}

    @property
    def known(self) -> Known:
        if self._known is None:
            raise ValueError("this task has not met its tokenizer: call for_tokenizer")
        return self._known

    def labels(self) -> Mapping[str, Sequence[str]]:
        return {"lm": ()}

    # --- text to tokens ---------------------------------------------------------------------------------------
    def encode(self, records: Sequence[Record], tokenizer: Tokenizer, *, labelled: bool) -> list[Example]:
        """One example a text, in windows of `max_length` tokens."""
        tokenizer.no_truncation()
        texts = [str(record[self.columns["text"]]) for record in records]
        return [self._windows(document) for part in _by_size(texts) for document in self._documents(part, tokenizer)]

    def _documents(self, texts: Sequence[str], tokenizer: Tokenizer) -> Iterator[Example]:
        """Each text as one sequence: its tokens, and the end token after them; before them too, where a first token
        could not be foreseen from anything else."""
        end = self.known.end
        before = [end] if self.options.objective == "causal" else []
        for found in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False):
            ids = np.array([*before, *found.ids, end], np.int64)
            words: dict[str, np.ndarray] = {}
            if self.options.whole_words:
                words["word"] = np.array([*_starts(found.word_ids), 1], np.int64)
            yield Example({"source": (Tokens(ids),)}, token_labels=words)

    def _windows(self, document: Example) -> Example:
        parts = list(run_together([document], self.options.max_length, self.known.first))
        labels = {name: np.concatenate([part.token_labels[name] for part in parts]) for name in document.token_labels}
        return Example({"source": tuple(part.streams["source"][0] for part in parts)}, token_labels=labels)

    def regroup(self, examples: Iterable[Example]) -> Iterator[Example]:
        documents, size, first = map(self._document, examples), self.options.max_length, self.known.first
        if self.options.documents == "joined":
            return run_together(documents, size, first)
        return side_by_side(
            map(self._foreseen, documents) if self.options.objective == "causal" else documents, size, first
        )

    def _document(self, windows: Example) -> Example:
        """The inverse of `_windows`, without an end token before the text: that of the text before stands there."""
        sequences, skip = windows.streams["source"], len(self.known.first)
        leading = int(self.options.objective == "causal")
        real = np.concatenate([np.arange(len(one.ids)) >= skip for one in sequences])
        ids = np.concatenate([one.ids for one in sequences])[real][leading:]
        words = {name: flat[real][leading:] for name, flat in windows.token_labels.items()}
        return Example({"source": (Tokens(ids),)}, token_labels=words)

    def _foreseen(self, document: Example) -> Example:
        """A text of which each token, the first and the end among them, is the label of what stands before it."""
        ids = document.streams["source"][0].ids
        return Example({"source": (Tokens(np.append(self.known.end, ids[:-1])),)}, token_labels={"lm": ids})

    @property
    def redraws(self) -> bool:
        return self.options.objective != "causal"

    def draw(self, batch: Batch, keys: UInt64[np.ndarray, "example"]) -> Batch:
        if self.options.objective == "span":
            return self._without_spans(batch, keys)
        stream = batch.streams["source"]
        example = np.repeat(stream.example, stream.lengths)
        if self.options.objective == "causal":
            if "lm" in batch.labels:
                return batch
            follows = np.append(example[1:] == example[:-1], False)
            labels = np.where(follows, np.append(stream.ids[1:], 0), 0)
            return replace(batch, labels={"lm": labels}, masks={"lm": follows})
        firsts = np.flatnonzero(np.append(True, example[1:] != example[:-1]))
        within = np.arange(len(example)) - firsts[np.cumsum(np.append(False, example[1:] != example[:-1]))]
        known = self.known
        rule = Masking(known.mask, known.size, known.special, self.options.mask_share)
        starts = batch.labels["word"] != 0 if self.options.whole_words else None
        if starts is not None:
            starts = starts | (stream.positions == 0) | np.isin(stream.ids, known.special)
        shown, chosen = rule.hide(stream.ids, keyed(within, 0) ^ keys[example], starts)
        labels = np.where(chosen, stream.ids, 0)
        return replace(
            batch,
            streams={**batch.streams, "source": replace(stream, ids=shown)},
            labels={"lm": labels},
            masks={"lm": chosen},
        )

    def _without_spans(self, batch: Batch, keys: UInt64[np.ndarray, "example"]) -> Batch:
        stream, options = batch.streams["source"], self.options
        begins = np.flatnonzero(np.diff(stream.example, prepend=-1))
        within = (
            np.arange(len(stream.example))
            - begins[np.searchsorted(begins, np.arange(len(stream.example)), "right") - 1]
        )
        known, parts = self.known, np.split(stream.ids, stream.offsets[1:-1])
        drawn = [
            corrupt_spans(
                ids, int(key), known.sentinels, known.end, share=options.mask_share, mean_span=options.mean_span
            )
            for ids, key in zip(parts, keyed(within, 0) ^ keys[stream.example], strict=True)
        ]
        source, target = (pack([Tokens(one[side]) for one in drawn], stream.example.tolist()) for side in (0, 1))
        labels, masks = {"lm": target.ids}, {"lm": np.ones(target.num_tokens, bool)}
        return replace(batch, streams={"source": source, "target": target}, labels=labels, masks=masks)

    # --- the model --------------------------------------------------------------------------------------------
    def attach(self, model: Model) -> None:
        objective, where = self.options.objective, "options.objective"
        if objective == "span" and model.trunk.sides == 1:
            hint = 'this one is not; set objective = "causal" or "masked"'
            raise UserError("the span objective needs an encoder-decoder", where=where, hint=hint)
        if objective != "span" and model.trunk.sides == 2:
            hint = 'set objective = "span", or start from a model with one side'
            raise UserError(f"an encoder-decoder does not learn by the {objective} objective", where=where, hint=hint)
        if objective == "causal" and not model.config.causal:
            hint = 'set objective = "masked", or start from a decoder'
            raise UserError("this model sees the tokens that it would have to foresee", where=where, hint=hint)
        if objective == "masked" and model.config.causal:
            hint = 'set objective = "causal", or start from an encoder'
            raise UserError("this model does not see what follows a hidden token", where=where, hint=hint)
        if self.options.max_length > model.config.max_positions:
            hint = f"give at most {model.config.max_positions}"
            raise UserError("blocks are longer than the model's positions", where="options.max_length", hint=hint)
        if "lm" not in model.heads:
            model.add_language_head("lm")

    def forward(self, model: Model, batch: Batch, arrange: Arrange = packed) -> Mapping[str, Tensor]:
        """The loss `[item]` of each labelled token. The logits, which would be the largest thing in memory by far, are
        used up on the way."""
        ids, positions, types, layout = arrange(batch.streams["source"], model.device)
        if self.options.objective == "span":
            memory = model.memory(ids, positions, layout)
            ids, positions, _, layout = arrange(batch.streams["target"], model.device)
            hidden = model.decoded(ids, positions, layout, memory)
        else:
            hidden = model.hidden(ids, positions, layout, types=types)
        if isinstance(layout, Dense):
            hidden = hidden[layout.mask]
        rows = torch.from_numpy(np.flatnonzero(batch.masks["lm"])).to(hidden.device)
        target = torch.from_numpy(batch.labels["lm"][batch.masks["lm"]]).to(hidden.device)
        return {"lm": cast("LMHead", model.heads["lm"]).losses(hidden.index_select(0, rows), target)}

    def _foretold(self, batch: Batch) -> Stream:
        """The stream whose tokens the labels are for."""
        return batch.streams["target" if self.options.objective == "span" else "source"]

    def item_weights(self, batch: Batch) -> Mapping[str, np.ndarray]:
        stream = self._foretold(batch)
        return {"lm": np.repeat(batch.weight[stream.example], stream.lengths)[batch.masks["lm"]]}

    def item_losses(self, outputs: Mapping[str, Tensor], batch: Batch) -> Mapping[str, Tensor]:
        return {"lm": outputs["lm"]}

    # --- answers ----------------------------------------------------------------------------------------------
    def items(self, request: BaseModel) -> list[Record]:
        assert isinstance(request, PretrainRequest)
        return [{self.columns["text"]: text} for text in request.texts]

    def probe(self, texts: Sequence[str]) -> BaseModel:
        return PretrainRequest(texts=list(texts), raw=True)

    def answer(self, model: Model, batch: Batch, records: Sequence[Record], tokenizer: Tokenizer) -> list[Score]:
        """What is hidden of a text is a function of the text, so that scores of different models compare."""
        stream = batch.streams["source"]
        texts = [np.zeros(0, np.int64)] * batch.num_examples
        for row in range(batch.num_examples):
            texts[row] = stream.ids[np.repeat(stream.example == row, stream.lengths)]
        drawn = self.draw(batch, keyed(np.array([zlib.crc32(ids.tobytes()) for ids in texts])))
        sequence = np.repeat(np.arange(len(stream.example)), self._foretold(drawn).lengths)[drawn.masks["lm"]]
        losses = [self.forward(model, part)["lm"].double().cpu().numpy() for part in self._cut(drawn)]
        count = len(stream.example)
        nll = np.bincount(sequence, np.concatenate([np.zeros(0), *losses]), minlength=count)
        tokens = np.bincount(sequence, minlength=count)
        sizes = [len(str(record[self.columns["text"]]).encode()) for record in records]
        owned = [stream.example == row for row in range(batch.num_examples)]
        return [Score(nll[own], tokens[own], size) for own, size in zip(owned, sizes, strict=True)]

    def _cut(self, batch: Batch) -> Iterator[Batch]:
        """The sequences of a batch in order, a bounded number of tokens at a time, or one longer sequence alone."""
        offsets = np.sum([stream.offsets for stream in batch.streams.values()], axis=0)
        labelled, start = self._foretold(batch).offsets, 0
        while start < len(offsets) - 1:
            room = offsets[start] + _SCORED_AT_ONCE
            stop = max(int(np.searchsorted(offsets, room, side="right")) - 1, start + 1)
            rows = slice(int(labelled[start]), int(labelled[stop]))
            labels = {name: flat[rows] for name, flat in batch.labels.items()}
            masks = {name: flat[rows] for name, flat in batch.masks.items()}
            streams = {name: stream.part(start, stop) for name, stream in batch.streams.items()}
            yield Batch(streams, labels, masks, batch.weight)
            start = stop

    def render(self, answer: Score, request: BaseModel | None = None) -> dict[str, Any]:
        shown: dict[str, Any] = {"loss": answer.loss, "perplexity": math.exp(answer.loss)}
        if self.options.objective == "causal":
            shown["bits_per_byte"] = answer.bits_per_byte
        shown["tokens"] = int(answer.tokens.sum())
        raw = isinstance(request, PretrainRequest) and request.raw
        return {**shown, "evidence": self.evidence(answer)} if raw else shown

    def evidence(self, answer: Score) -> dict[str, float]:
        return {"nll": float(answer.nll.sum())}

    def evaluate(self, answers: Sequence[Score], records: Sequence[Record]) -> Metrics:
        """Intervals are over windows, of which one long text gives many."""
        nll = np.concatenate([answer.nll for answer in answers])
        tokens = np.concatenate([answer.tokens for answer in answers])
        if not tokens.sum():
            raise UserError("there is no token to score", hint="give longer texts")
        loss = float(nll.sum() / tokens.sum())
        low, high = metrics.bootstrap(lambda rows: float(nll[rows].sum() / max(tokens[rows].sum(), 1)), len(nll))
        values = {"loss": loss, "perplexity": math.exp(loss)}
        intervals = {"loss": (low, high), "perplexity": (math.exp(low), math.exp(high))}
        if self.options.objective == "causal":
            bits = float(tokens.sum()) / max(sum(answer.bytes for answer in answers), 1) / math.log(2)
            values["bits_per_byte"] = loss * bits
            intervals["bits_per_byte"] = (low * bits, high * bits)
        return Metrics({**values, "tokens": float(tokens.sum())}, intervals, {})


def _starts(word_ids: Sequence[int | None]) -> list[int]:
    """1 at the first token of each word."""
    return [int(i == 0 or word != word_ids[i - 1]) for i, word in enumerate(word_ids)]


def _by_size(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in order, a bounded number of characters at a time, or one longer text alone."""
    part: list[str] = []
    size = 0
    for text in texts:
        if part and size + len(text) > _ENCODED_AT_ONCE:
            yield part
            part, size = [], 0
        part.append(text)
        size += len(text)
    if part:
        yield part


def _is_set(options: PretrainOptions, name: str, *, but: Objective) -> bool:
    """Whether an option that acts with one objective alone has been set with another."""
    return options.objective != but and getattr(options, name) != getattr(PretrainOptions, name)
