"""Causal language modelling: learn to continue text, answer by greedy decoding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import torch
from annotated_types import Ge
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from lexmill import metrics
from lexmill.data.batch import IGNORE, Batch, Example, Tokens
from lexmill.errors import UserError
from lexmill.models import Model
from lexmill.models.generate import greedy
from lexmill.nn.layout import Dense
from lexmill.tasks.base import Metrics, Record, Task, Wants, register
from lexmill.tasks.inputs import Arrange, packed

_PROBE_CHARS = 400
_END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>", "[SEP]")


@dataclass(frozen=True)
class GenerateOptions:
    """What may be set for `generate`.

    Args:
        max_length: tokens a training text is cut to.
        max_new_tokens: the most that one answer may hold, where the request does not say.
        end_token: the token that ends a text. Default: the first of the usual ones that the tokenizer knows.
    """

    max_length: Annotated[int, Ge(2)] = 512
    max_new_tokens: Annotated[int, Ge(1)] = 64
    end_token: str | None = None


class GenerateRequest(BaseModel):
    """Prompts to continue."""

    model_config = ConfigDict(extra="forbid")

    prompts: list[str] = Field(min_length=1)
    max_new_tokens: int | None = Field(default=None, ge=1, le=4096, description="Default: the model's own.")
    raw: bool = Field(default=False, description="Return the log-probability of every token too.")


class GenerateAnswer(BaseModel):
    """The continuation of one prompt."""

    text: str
    finish_reason: str = Field(description="`end`: the end token came; `length`: max_new_tokens were written.")
    tokens: int
    logprobs: dict[str, float] | None = Field(default=None, description="With `raw`: index:token to log-probability.")


@dataclass(frozen=True)
class Continuation:
    """Generated tokens, each with its log-probability."""

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str


@dataclass(frozen=True)
class Score:
    """How well the model foresaw a given text: the summed negative log-likelihood (nats) of `tokens` tokens."""

    nll: float
    tokens: int


@register
class Generate(Task):
    """Loss on given tokens; with a `text_pair` column the text is a prompt, and only the pair is learnt."""

    name = "generate"
    Request = GenerateRequest
    Answer = GenerateAnswer
    Options = GenerateOptions
    metric: ClassVar[str] = "loss"
    metric_sign: ClassVar[int] = -1
    evidence_field: ClassVar[str] = "logprobs"

    def __init__(self, columns: Mapping[str, str], options: GenerateOptions) -> None:
        self.columns = dict(columns)
        self.options = options

    @classmethod
    def wants(cls, options: GenerateOptions) -> Wants:
        return Wants(labels="none", max_tokens=options.max_length)

    @classmethod
    def from_records(cls, records: Iterable[Record], columns: Mapping[str, str], options: GenerateOptions) -> Self:
        return cls({role: columns[role] for role in ("text", "text_pair") if role in columns}, options)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        return cls(state["columns"], GenerateOptions(**state["options"]))

    def state(self) -> dict[str, Any]:
        return {"columns": self.columns, "options": asdict(self.options)}

    def labels(self) -> Mapping[str, Sequence[str]]:
        return {"lm": ()}

    # --- text to tokens ---------------------------------------------------------------------------------------
    def encode(self, records: Sequence[Record], tokenizer: Tokenizer, *, labelled: bool) -> list[Example]:
        tokenizer.no_truncation()
        prompts = tokenizer.encode_batch_fast([str(record[self.columns["text"]]) for record in records])
        if not labelled:
            return [Example({"source": (Tokens(np.array(_nonempty(p.ids), np.int64)),)}) for p in prompts]
        end = [self._end(tokenizer)]
        if "text_pair" not in self.columns:
            return [self._example([], [*p.ids, *end]) for p in prompts]
        replies = tokenizer.encode_batch_fast(
            [str(record[self.columns["text_pair"]]) for record in records], add_special_tokens=False
        )
        return [self._example(p.ids, [*r.ids, *end]) for p, r in zip(prompts, replies, strict=True)]

    def _example(self, prompt: Sequence[int], reply: Sequence[int]) -> Example:
        ids = np.array([*prompt, *reply][: self.options.max_length], np.int64)
        labels = np.append(ids[1:], IGNORE)
        labels[: max(len(prompt) - 1, 0)] = IGNORE
        return Example({"source": (Tokens(ids),)}, token_labels={"lm": labels})

    def _end(self, tokenizer: Tokenizer) -> int:
        wanted = (self.options.end_token,) if self.options.end_token else _END_TOKENS
        for token in wanted:
            found = tokenizer.token_to_id(token)
            if found is not None:
                return found
        raise UserError(f"the tokenizer knows none of the end tokens {', '.join(wanted)}", hint="set options.end_token")

    # --- the model --------------------------------------------------------------------------------------------
    def attach(self, model: Model) -> None:
        if "lm" not in model.heads:
            model.add_language_head("lm")

    def forward(self, model: Model, batch: Batch, arrange: Arrange = packed) -> Mapping[str, Tensor]:
        """Logits `[item, vocab]` of the labelled tokens alone."""
        ids, positions, types, layout = arrange(batch.streams["source"], model.device)
        hidden = model.hidden(ids, positions, layout, types=types)
        if isinstance(layout, Dense):
            hidden = hidden[layout.mask]
        rows = torch.from_numpy(np.flatnonzero(batch.masks["lm"])).to(hidden.device)
        return {"lm": model.heads["lm"](hidden[rows])}

    def item_weights(self, batch: Batch) -> Mapping[str, np.ndarray]:
        stream = batch.streams["source"]
        by_token = np.repeat(batch.weight[stream.example], stream.lengths)
        return {"lm": by_token[batch.masks["lm"]]}

    def item_losses(self, outputs: Mapping[str, Tensor], batch: Batch) -> Mapping[str, Tensor]:
        target = torch.from_numpy(batch.labels["lm"][batch.masks["lm"]]).to(outputs["lm"].device)
        return {"lm": F.cross_entropy(outputs["lm"], target, reduction="none")}

    # --- answers ----------------------------------------------------------------------------------------------
    def items(self, request: BaseModel) -> list[Record]:
        assert isinstance(request, GenerateRequest)
        limit = request.max_new_tokens or self.options.max_new_tokens
        return [{self.columns["text"]: prompt, "max_new_tokens": limit} for prompt in request.prompts]

    def probe(self, texts: Sequence[str]) -> BaseModel:
        return GenerateRequest(prompts=[text[:_PROBE_CHARS] for text in texts], max_new_tokens=8, raw=True)

    def answer(
        self, model: Model, batch: Batch, records: Sequence[Record], tokenizer: Tokenizer
    ) -> list[Continuation] | list[Score]:
        if "lm" in batch.labels:
            return self._score(model, batch)
        stream = batch.streams["source"]
        prompts = np.split(stream.ids, stream.offsets[1:-1])
        limits = [int(record.get("max_new_tokens", self.options.max_new_tokens)) for record in records]
        end = self._end(tokenizer)
        found = greedy(model, [p.tolist() for p in prompts], limits, end_ids={end})
        return [
            Continuation(
                tokenizer.decode([i for i in one.ids if i != end]),
                tuple(one.ids),
                tuple(one.logprobs),
                "end" if one.ids and one.ids[-1] == end else "length",
            )
            for one in found
        ]

    def _score(self, model: Model, batch: Batch) -> list[Score]:
        losses = self.item_losses(self.forward(model, batch), batch)["lm"].double().cpu().numpy()
        stream = batch.streams["source"]
        owner = np.repeat(stream.example, stream.lengths)[batch.masks["lm"]]
        nll = np.bincount(owner, weights=losses, minlength=batch.num_examples)
        tokens = np.bincount(owner, minlength=batch.num_examples)
        return [Score(float(a), int(b)) for a, b in zip(nll, tokens, strict=True)]

    def render(self, answer: Continuation | Score, request: BaseModel | None = None) -> dict[str, Any]:
        if isinstance(answer, Score):
            return {"loss": answer.nll / max(answer.tokens, 1), "tokens": answer.tokens}
        shown = {"text": answer.text, "finish_reason": answer.finish_reason, "tokens": len(answer.ids)}
        raw = isinstance(request, GenerateRequest) and request.raw
        return {**shown, "logprobs": self.evidence(answer)} if raw else shown

    def evidence(self, answer: Continuation | Score) -> dict[str, float]:
        if isinstance(answer, Score):
            return {"nll": answer.nll}
        return {f"{i}:{token}": value for i, (token, value) in enumerate(zip(answer.ids, answer.logprobs, strict=True))}

    def item_scores(self, answers: Sequence[Score], records: Sequence[Record]) -> np.ndarray:
        """The mean log-likelihood of a row's tokens, in nats."""
        return np.array([-answer.nll / answer.tokens if answer.tokens else np.nan for answer in answers])

    def evaluate(self, answers: Sequence[Score], records: Sequence[Record]) -> Metrics:
        nll = np.array([answer.nll for answer in answers])
        tokens = np.array([answer.tokens for answer in answers])
        if not tokens.sum():
            raise UserError("there is no token to score", hint="give longer texts, or a larger options.max_length")
        loss = float(nll.sum() / tokens.sum())
        interval = metrics.bootstrap(lambda rows: float(nll[rows].sum() / tokens[rows].sum()), len(nll))
        return Metrics(
            {"loss": loss, "perplexity": math.exp(loss), "tokens": float(tokens.sum())},
            {"loss": interval, "perplexity": (math.exp(interval[0]), math.exp(interval[1]))},
            {},
        )


def _nonempty(ids: list[int]) -> list[int]:
    if not ids:
        raise UserError("an empty prompt", hint="give at least one character")
    return ids
