"""From one text to another: translation, summaries, texts from data. Learns given targets, answers by beam search."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from annotated_types import Ge, Le, Lt
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from lexmill import metrics
from lexmill.data.batch import Batch, Example, Tokens
from lexmill.data.columns import Role
from lexmill.errors import UserError
from lexmill.metrics.texts import BleuTokenizer, text_metrics
from lexmill.models import Beams, LMHead, Memory, Model, Said, search
from lexmill.nn.layout import Dense
from lexmill.tasks.base import Metrics, Record, Task, Wants, register
from lexmill.tasks.inputs import Arrange, packed
from lexmill.tasks.smoothing import smoothing_cost

SOURCES = ("source", "src", "input", "article", "document", "meaning_representation", "mr", "text", "en", "原文")
TARGETS = ("target", "tgt", "output", "summary", "highlights", "translation", "reference", "references", "ref",
           "de", "zh", "fr", "译文", "摘要")  # fmt: skip
_END_TOKENS = ("</s>", "<|im_end|>", "<|endoftext|>", "<eos>", "[EOS]", "[SEP]")
_PROBE_CHARS = 400


@dataclass(frozen=True)
class Seq2SeqOptions:
    """What may be set for `seq2seq`.

    Args:
        prefix: text before every source, as T5 was taught: `translate English to German: `.
        max_source_length: tokens a source is cut to; `max_target_length` those of a target, end token included.
        label_smoothing: share of the label's probability that is spread over the vocabulary (Szegedy et al. 2016).
        num_beams, length_penalty, early_stopping: how answers are searched for, see `models.Beams`; requests may say
            otherwise.
        max_new_tokens: the most that one answer may hold, where the request does not say.
        end_token: the token that ends a target. Default: the first of the usual ones that the tokenizer knows.
        bleu_tokenizer: how BLEU splits texts; `auto` takes `zh` for Chinese references, else `13a`.
    """

    prefix: str = ""
    max_source_length: Annotated[int, Ge(1)] = 256
    max_target_length: Annotated[int, Ge(1)] = 128
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    num_beams: Annotated[int, Ge(1)] = 4
    length_penalty: Annotated[float, Ge(-10), Le(10)] = 1.0
    early_stopping: bool = False
    max_new_tokens: Annotated[int, Ge(1)] = 128
    end_token: str | None = None
    bleu_tokenizer: Literal["auto", "13a", "intl", "zh", "char", "none"] = "auto"


class Seq2SeqRequest(BaseModel):
    """Texts to answer. What is not given is as the model was trained to do."""

    model_config = ConfigDict(extra="forbid")

    texts: list[str] = Field(min_length=1)
    num_beams: int | None = Field(default=None, ge=1, le=64, description="1 is greedy search.")
    length_penalty: float | None = Field(default=None, ge=-10, le=10, description="Larger ones favour longer texts.")
    max_new_tokens: int | None = Field(default=None, ge=1, le=4096)
    raw: bool = Field(default=False, description="Return the log-probability of every token too.")


class Seq2SeqAnswer(BaseModel):
    """The answer to one text."""

    text: str
    score: float = Field(description="Summed log-probability over the number of tokens to the power of length_penalty.")
    finish_reason: str = Field(description="`end`: the end token came; `length`: max_new_tokens were written.")
    tokens: int
    logprobs: dict[str, float] | None = Field(default=None, description="With `raw`: index:token to log-probability.")


@dataclass(frozen=True)
class Reply:
    """What was said to one source; where targets are known, their summed negative log-likelihood (nats) over so many
    tokens too."""

    text: str
    said: Said
    ended: bool
    nll: float = 0.0
    tokens: int = 0


@register
class Seq2Seq(Task):
    """Loss on the tokens of the target. A record may have several targets: all are learnt, and compared with."""

    name = "seq2seq"
    Request = Seq2SeqRequest
    Answer = Seq2SeqAnswer
    Options = Seq2SeqOptions
    roles: ClassVar[tuple[Role, ...]] = (Role("source", SOURCES), Role("target", TARGETS, input=False))
    metric: ClassVar[str] = "chrf"
    evidence_field: ClassVar[str] = "logprobs"

    def __init__(self, columns: Mapping[str, str], options: Seq2SeqOptions) -> None:
        self.columns = dict(columns)
        self.options = options

    @classmethod
    def wants(cls, options: Seq2SeqOptions) -> Wants:
        return Wants(labels="none", max_tokens=options.max_source_length)

    @classmethod
    def from_records(cls, records: Iterable[Record], columns: Mapping[str, str], options: Seq2SeqOptions) -> Self:
        return cls({role: columns[role] for role in ("source", "target")}, options)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        return cls(state["columns"], Seq2SeqOptions(**state["options"]))

    def state(self) -> dict[str, Any]:
        return {"columns": self.columns, "options": asdict(self.options)}

    def labels(self) -> Mapping[str, Sequence[str]]:
        return {"lm": ()}

    # --- text to tokens ---------------------------------------------------------------------------------------
    def encode(self, records: Sequence[Record], tokenizer: Tokenizer, *, labelled: bool) -> list[Example]:
        tokenizer.enable_truncation(self.options.max_source_length)
        sources = tokenizer.encode_batch_fast([self._source(record) for record in records])
        targets = self._encode_targets(records, tokenizer) if labelled else [()] * len(records)
        examples: list[Example] = []
        for source, said in zip(sources, targets, strict=True):
            if not source.ids:
                raise UserError("an empty source", hint="give at least one character")
            streams = {"source": (Tokens(np.array(source.ids, np.int64)),)}
            examples.append(Example(streams | ({"target": said} if labelled else {})))
        return examples

    def _encode_targets(self, records: Sequence[Record], tokenizer: Tokenizer) -> list[tuple[Tokens, ...]]:
        tokenizer.no_truncation()
        texts = [self._targets(record) for record in records]
        flat = tokenizer.encode_batch_fast([text for several in texts for text in several], add_special_tokens=False)
        end, most = self._end(tokenizer), self.options.max_target_length - 1
        encoded = iter(Tokens(np.array([*one.ids[:most], end], np.int64)) for one in flat)
        return [tuple(next(encoded) for _ in several) for several in texts]

    def _source(self, record: Record) -> str:
        text = record[self.columns["source"]]
        if not isinstance(text, str):
            raise UserError(f"column '{self.columns['source']}' holds {text!r}, which is no text")
        return self.options.prefix + text

    def _targets(self, record: Record) -> list[str]:
        value = record.get(self.columns["target"])
        several: list[Any] = cast("list[Any]", value) if isinstance(value, list) else [value]
        if not several or not all(isinstance(one, str) for one in several):
            hint = "give one text, or a list of texts"
            raise UserError(f"column '{self.columns['target']}' holds {value!r}", hint=hint)
        return [str(one) for one in several]

    def _end(self, tokenizer: Tokenizer) -> int:
        wanted = (self.options.end_token,) if self.options.end_token else _END_TOKENS
        for token in wanted:
            found = tokenizer.token_to_id(token)
            if found is not None:
                return found
        raise UserError(f"the tokenizer knows none of the end tokens {', '.join(wanted)}", hint="set options.end_token")

    # --- the model --------------------------------------------------------------------------------------------
    def attach(self, model: Model) -> None:
        _ = model.decoding_trunk  # a model without one is refused before anything is trained
        if "lm" not in model.heads:
            model.add_language_head("lm")

    def forward(self, model: Model, batch: Batch, arrange: Arrange = packed) -> Mapping[str, Tensor]:
        """Logits `[item, vocab]` of the target tokens where labels are smoothed, else their losses `[item]`."""
        hidden = self._decoded(model, batch, self._memory(model, batch, arrange), arrange)
        if self.options.label_smoothing and model.training:
            return {"lm": model.heads["lm"](hidden)}
        return {"lm": cast("LMHead", model.heads["lm"]).losses(hidden, self._said(batch, hidden.device))}

    def _memory(self, model: Model, batch: Batch, arrange: Arrange = packed) -> Memory:
        ids, positions, _, layout = arrange(batch.streams["source"], model.device)
        return model.memory(ids, positions, layout)

    def _decoded(self, model: Model, batch: Batch, memory: Memory, arrange: Arrange = packed) -> Tensor:
        """The hidden state of each target token, `[item, dim]`."""
        target = batch.streams["target"]
        if len(target.example) != batch.num_examples:
            memory = memory.of(torch.from_numpy(target.example))
        ids, positions, _, layout = arrange(target, model.device)
        hidden = model.decoded(ids, positions, layout, memory)
        return hidden[layout.mask] if isinstance(layout, Dense) else hidden

    @staticmethod
    def _said(batch: Batch, device: torch.device) -> Tensor:
        return torch.from_numpy(batch.streams["target"].ids).to(device)

    def item_weights(self, batch: Batch) -> Mapping[str, np.ndarray]:
        target = batch.streams["target"]
        return {"lm": np.repeat(batch.weight[target.example], target.lengths)}

    def item_losses(self, outputs: Mapping[str, Tensor], batch: Batch) -> Mapping[str, Tensor]:
        out = outputs["lm"]
        if out.dim() == 1:
            return {"lm": out}
        smoothing = self.options.label_smoothing
        return {"lm": F.cross_entropy(out, self._said(batch, out.device), reduction="none", label_smoothing=smoothing)}

    def shown(self, outputs: Mapping[str, Tensor], batch: Batch) -> Mapping[str, Tensor]:
        """`smoothing_cost` of smoothed labels."""
        out, share = outputs["lm"], self.options.label_smoothing
        return {"smoothing_cost": smoothing_cost(out, self._said(batch, out.device), share)} if out.dim() > 1 else {}

    # --- answers ----------------------------------------------------------------------------------------------
    def items(self, request: BaseModel) -> list[Record]:
        assert isinstance(request, Seq2SeqRequest)
        asked = {name: getattr(request, name) for name in ("num_beams", "length_penalty", "max_new_tokens")}
        told = {name: value for name, value in asked.items() if value is not None}
        return [{self.columns["source"]: text, **told} for text in request.texts]

    def probe(self, texts: Sequence[str]) -> BaseModel:
        return Seq2SeqRequest(texts=[text[:_PROBE_CHARS] for text in texts], max_new_tokens=8, raw=True)

    def answer(self, model: Model, batch: Batch, records: Sequence[Record], tokenizer: Tokenizer) -> list[Reply]:
        memory, end = self._memory(model, batch), self._end(tokenizer)
        nll, tokens = self._score(model, batch, memory)
        replies: list[Reply] = []
        for i, said in enumerate(self._search(model, memory, records, end)):
            text = tokenizer.decode([token for token in said.ids if token != end])
            replies.append(Reply(text, said, said.ids[-1] == end, float(nll[i]), int(tokens[i])))
        return replies

    def _search(self, model: Model, memory: Memory, records: Sequence[Record], end: int) -> list[Said]:
        """Search for each record as it asks; those that ask alike go together."""
        own = self.options
        alike: dict[Beams, list[int]] = {}
        for i, record in enumerate(records):
            beams, penalty = record.get("num_beams", own.num_beams), record.get("length_penalty", own.length_penalty)
            alike.setdefault(Beams(beams, penalty, own.early_stopping), []).append(i)
        found = [Said()] * len(records)
        for beams, rows in alike.items():
            limits = [int(records[i].get("max_new_tokens", own.max_new_tokens)) for i in rows]
            some = memory if len(rows) == len(records) else memory.of(torch.tensor(rows))
            for i, said in zip(rows, search(model, some, limits, {end}, beams), strict=True):
                found[i] = said
        return found

    def _score(self, model: Model, batch: Batch, memory: Memory) -> tuple[np.ndarray, np.ndarray]:
        """By example, the summed loss of its targets' tokens and how many they are; 0 where there are none."""
        if "target" not in batch.streams:
            return np.zeros(batch.num_examples), np.zeros(batch.num_examples)
        hidden = self._decoded(model, batch, memory)
        losses = cast("LMHead", model.heads["lm"]).losses(hidden, self._said(batch, hidden.device))
        target = batch.streams["target"]
        owner = np.repeat(target.example, target.lengths)
        nll = np.bincount(owner, weights=losses.double().cpu().numpy(), minlength=batch.num_examples)
        return nll, np.bincount(owner, minlength=batch.num_examples)

    def render(self, answer: Reply, request: BaseModel | None = None) -> dict[str, Any]:
        shown = {
            "text": answer.text,
            "score": answer.said.score,
            "finish_reason": "end" if answer.ended else "length",
            "tokens": len(answer.said.ids),
        }
        raw = isinstance(request, Seq2SeqRequest) and request.raw
        return {**shown, "logprobs": self.evidence(answer)} if raw else shown

    def evidence(self, answer: Reply) -> dict[str, float]:
        pairs = zip(answer.said.ids, answer.said.logprobs, strict=True)
        return {f"{i}:{token}": value for i, (token, value) in enumerate(pairs)}

    def evaluate(self, answers: Sequence[Reply], records: Sequence[Record]) -> Metrics:
        """BLEU, chrF and ROUGE of the answers; loss and perplexity of the targets. Rows with one source are one item,
        whose references are all of their targets."""
        nll = np.array([answer.nll for answer in answers])
        tokens = np.array([answer.tokens for answer in answers])
        texts: dict[str, str] = {}
        references: dict[str, list[str]] = {}
        for answer, record in zip(answers, records, strict=True):
            source = self._source(record)
            texts.setdefault(source, answer.text)
            references.setdefault(source, []).extend(self._targets(record))
        tokenizer: BleuTokenizer = self.options.bleu_tokenizer
        found = text_metrics(list(texts.values()), list(references.values()), tokenizer=tokenizer)
        loss = float(nll.sum() / tokens.sum())
        low, high = metrics.bootstrap(lambda rows: float(nll[rows].sum() / tokens[rows].sum()), len(nll))
        shown = [{"source": s, "answer": texts[s], "references": references[s]} for s in list(texts)[:10]]
        return Metrics(
            {name: value for name, (value, _) in found.items()} | {"loss": loss, "perplexity": math.exp(loss)},
            {name: interval for name, (_, interval) in found.items()}
            | {"loss": (low, high), "perplexity": (math.exp(low), math.exp(high))},
            {"samples": shown},
        )
