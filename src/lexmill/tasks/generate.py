"""Causal language modelling: learn to continue text and dialogues, from examples or from preferences, and answer."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from annotated_types import Ge, Gt, Lt
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from lexmill import metrics
from lexmill.data.batch import Batch, Example, Tokens, collate
from lexmill.data.chat import CHAT_FILE, ChatTemplate
from lexmill.errors import UserError
from lexmill.models import Generated, LMHead, Model, Sampling, generate, weights_digest
from lexmill.nn.layout import Dense
from lexmill.tasks import preference
from lexmill.tasks.base import Hear, Metrics, Record, Task, Wants, register
from lexmill.tasks.dialogue import ROLES, Dialogue
from lexmill.tasks.inputs import Arrange, packed
from lexmill.tasks.preference import Preference
from lexmill.tasks.speaking import Speaker

_PROBE_CHARS = 400
_END_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "</s>", "[SEP]")
_SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")
_REFERENCE_ROWS = 8


@dataclass(frozen=True)
class GenerateOptions:
    """What may be set for `generate`.

    Args:
        max_length: tokens a training text is cut to.
        max_new_tokens: the most that one answer may hold, where the request does not say.
        end_token: the token that ends a text. Default: the first of the usual ones that the tokenizer knows.
        format: whether a prompt is put to the model as a user's turn (`chat`) or as it is (`plain`). `auto` is chat
            for instructions, dialogues and preferences where the model has a chat template, and plain otherwise.
        chat_template: a Jinja template. Default: the model's own.
        chat_tokens: special tokens that it may name, e.g. `bos_token`. Default: the model's own.
        beta: with the columns `chosen` and `rejected`: how dear it is to move away from the starting model.
        label_smoothing: with these columns: the share of pairs that are taken to be labelled the wrong way round.
        write_answers: an evaluation also answers each prompt, and says how varied the answers are.
    """

    max_length: Annotated[int, Ge(2)] = 512
    max_new_tokens: Annotated[int, Ge(1)] = 64
    end_token: str | None = None
    format: Literal["auto", "plain", "chat"] = "auto"
    chat_template: str | None = None
    chat_tokens: dict[str, str] = field(default_factory=dict[str, str])
    beta: Annotated[float, Gt(0)] = 0.1
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0
    write_answers: bool = False


class ChatMessage(BaseModel):
    """One turn of a dialogue."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class GenerateRequest(BaseModel):
    """Prompts to answer: texts, or the messages of a dialogue."""

    model_config = ConfigDict(extra="forbid")

    prompts: list[str | list[ChatMessage]] = Field(min_length=1, description="A text or a list of messages an item.")
    max_new_tokens: int | None = Field(default=None, ge=1, le=4096, description="Default: the model's own.")
    temperature: float = Field(default=0.0, ge=0, le=10, description="0 takes the likeliest token each time.")
    top_k: int = Field(default=0, ge=0, description="Draw from so many likeliest tokens; 0 for all.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Draw from the likeliest tokens of this probability.")
    repetition_penalty: float = Field(default=1.0, gt=0, le=10, description="Above 1, what was said is said less.")
    seed: int | None = Field(default=None, ge=0, lt=2**62, description="Of item 0; item i draws with seed + i.")
    stop: list[str] = Field(
        default=[], max_length=16, description="Strings that end an answer, and are not part of it."
    )
    stream: bool = Field(default=False, description="Send the text in pieces, as server-sent events.")
    raw: bool = Field(default=False, description="Return the log-probability of every token too.")


class GenerateAnswer(BaseModel):
    """The continuation of one prompt."""

    text: str
    finish_reason: str = Field(
        description="`end`: the end token came; `stop`: a stop string; `length`: max_new_tokens were written."
    )
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
    """How well the model foresaw a given text: the summed negative log-likelihood (nats) of `tokens` tokens; and the
    answer that it would have given itself, where that was asked."""

    nll: float
    tokens: int
    answer: tuple[int, ...] | None = None


@register
class Generate(Task):
    """Texts, replies to prompts, dialogues, and preferences between two replies. Where there is a prompt, it is given,
    and only what answers it is learnt."""

    roles = ROLES
    name = "generate"
    Request = GenerateRequest
    Answer = GenerateAnswer
    Options = GenerateOptions
    metric: ClassVar[str] = "loss"
    metric_sign: ClassVar[int] = -1
    evidence_field: ClassVar[str] = "logprobs"

    def __init__(
        self,
        columns: Mapping[str, str],
        options: GenerateOptions,
        reference: str | None = None,
    ) -> None:
        self.columns = dict(columns)
        self.options = options
        template = ChatTemplate(options.chat_template, options.chat_tokens) if options.chat_template else None
        self._reference = reference
        self._before: dict[bytes, tuple[float, float]] = {}
        turns = any(role in columns for role in ("messages", "instruction"))
        wished = turns or ("chosen" in columns and template is not None)
        chat = wished if options.format == "auto" else options.format == "chat"
        self._dialogue = Dialogue(self.columns, template, chat, options.max_length)

    @property
    def _prefers(self) -> bool:
        return "chosen" in self.columns

    @classmethod
    def wants(cls, options: GenerateOptions) -> Wants:
        return Wants(labels="none", max_tokens=options.max_length)

    @classmethod
    def defaults(cls, directory: Path) -> Mapping[str, Any]:
        found = ChatTemplate.read(directory)
        return {} if found is None else {"chat_template": found.source, "chat_tokens": dict(found.tokens)}

    @classmethod
    def from_records(cls, records: Iterable[Record], columns: Mapping[str, str], options: GenerateOptions) -> Self:
        known = {role.name for role in ROLES}
        return cls({role: column for role, column in columns.items() if role in known}, options)

    def before(self, model: Model, records: Iterator[Record], tokenizer: Tokenizer) -> Self:
        """With preferences, the log-probabilities of every pair under the starting model, so that it need not be kept
        in memory beside the one that is trained."""
        if not self._prefers:
            return self
        names = "".join(weights_digest(model).values())
        found = type(self)(self.columns, self.options, _short(names))
        model.eval()
        for group in _groups(records, _REFERENCE_ROWS):
            examples = self.encode(group, tokenizer, labelled=True)
            with torch.inference_mode():
                pairs = self.forward(model, collate(examples))["preference"].reshape(-1, 2).tolist()
            for example, (chosen, rejected) in zip(examples, pairs, strict=True):
                found._before[preference.digest(example)] = (chosen, rejected)
        return found

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        return cls(state["columns"], GenerateOptions(**state["options"]), state.get("reference"))

    def state(self) -> dict[str, Any]:
        found = {"columns": self.columns, "options": asdict(self.options)}
        return found | ({"reference": self._reference} if self._prefers else {})

    def labels(self) -> Mapping[str, Sequence[str]]:
        return {"lm": ()}

    def files(self, model: Model) -> Mapping[str, str]:
        template = self.options.chat_template
        return {} if template is None else {CHAT_FILE: template}

    # --- text to tokens ---------------------------------------------------------------------------------------
    def encode(self, records: Sequence[Record], tokenizer: Tokenizer, *, labelled: bool) -> list[Example]:
        tokenizer.no_truncation()
        if not labelled:
            prompts = [self._dialogue.prompt(record, tokenizer) for record in records]
            return [Example({"source": (Tokens(np.array(_nonempty(ids), np.int64)),)}) for ids in prompts]
        end = self._end(tokenizer)
        if self._prefers:
            return [self._pair(record, tokenizer, end) for record in records]
        learnt = [self._dialogue.learnt(record, tokenizer, end) for record in records]
        return [Example({"source": (Tokens(one.ids),)}, token_labels={"lm": one.labels}) for one in learnt]

    def _pair(self, record: Record, tokenizer: Tokenizer, end: int) -> Example:
        replies = (str(record[self.columns[role]]) for role in ("chosen", "rejected"))
        both = [self._dialogue.reply(record, reply, tokenizer, end) for reply in replies]
        labels = {"lm": np.concatenate([one.labels for one in both])}
        example = Example({"source": tuple(Tokens(one.ids) for one in both)}, token_labels=labels)
        known = self._before.get(preference.digest(example))
        return example if known is None else replace(example, labels={"reference": np.array(known, np.float64)})

    def _end(self, tokenizer: Tokenizer) -> int:
        wanted = (self.options.end_token,) if self.options.end_token else _END_TOKENS
        for token in wanted:
            found = tokenizer.token_to_id(token)
            if found is not None:
                return found
        raise UserError(f"the tokenizer knows none of the end tokens {', '.join(wanted)}", hint="set options.end_token")

    # --- the model --------------------------------------------------------------------------------------------
    def attach(self, model: Model) -> None:
        if not model.config.causal:
            hint = "start from a decoder; an encoder-decoder answers texts with the task seq2seq"
            raise UserError("this model sees the tokens that it would have to foresee", where="model", hint=hint)
        if "lm" not in model.heads:
            model.add_language_head("lm")

    def forward(self, model: Model, batch: Batch, arrange: Arrange = packed) -> Mapping[str, Tensor]:
        """Logits `[item, vocab]` of the labelled tokens alone; with preferences the log-probability of each reply,
        chosen and rejected in turn."""
        ids, positions, types, layout = arrange(batch.streams["source"], model.device)
        hidden = model.hidden(ids, positions, layout, types=types)
        if isinstance(layout, Dense):
            hidden = hidden[layout.mask]
        rows = torch.from_numpy(np.flatnonzero(batch.masks["lm"])).to(hidden.device)
        if not self._prefers:
            return {"lm": model.heads["lm"](hidden[rows])}
        head = model.heads["lm"]
        assert isinstance(head, LMHead)
        target = torch.from_numpy(batch.labels["lm"][batch.masks["lm"]]).to(hidden.device)
        losses = head.losses(hidden[rows], target)
        stream = batch.streams["source"]
        owner = np.repeat(np.arange(len(stream.lengths)), stream.lengths)[batch.masks["lm"]]
        total = losses.new_zeros(len(stream.lengths))
        return {"preference": -total.index_add(0, torch.from_numpy(owner).to(hidden.device), losses)}

    def item_weights(self, batch: Batch) -> Mapping[str, np.ndarray]:
        if self._prefers:
            return {"preference": batch.weight}
        stream = batch.streams["source"]
        by_token = np.repeat(batch.weight[stream.example], stream.lengths)
        return {"lm": by_token[batch.masks["lm"]]}

    def item_losses(self, outputs: Mapping[str, Tensor], batch: Batch) -> Mapping[str, Tensor]:
        if self._prefers:
            pairs = outputs["preference"].reshape(-1, 2)
            reference = torch.from_numpy(batch.labels["reference"]).to(pairs)
            return {"preference": preference.losses(pairs, reference, self.options.beta, self.options.label_smoothing)}
        target = torch.from_numpy(batch.labels["lm"][batch.masks["lm"]]).to(outputs["lm"].device)
        return {"lm": F.cross_entropy(outputs["lm"], target, reduction="none")}

    # --- answers ----------------------------------------------------------------------------------------------
    def items(self, request: BaseModel) -> list[Record]:
        assert isinstance(request, GenerateRequest)
        asked: dict[str, Any] = {"max_new_tokens": request.max_new_tokens or self.options.max_new_tokens}
        asked |= request.model_dump(include={*_SAMPLING, "stop"}, exclude_defaults=True)
        found: list[Record] = []
        for i, prompt in enumerate(request.prompts):
            own = {"seed": request.seed + i} if request.seed is not None else {}
            found.append({**self._put(prompt), **asked, **own})
        return found

    def _put(self, prompt: str | list[ChatMessage]) -> dict[str, Any]:
        if not isinstance(prompt, str):
            return {self.columns.get("messages", "messages"): [message.model_dump() for message in prompt]}
        if "messages" in self.columns:
            return {self.columns["messages"]: [{"role": "user", "content": prompt}]}
        return {self.columns["instruction" if "instruction" in self.columns else "text"]: prompt}

    def probe(self, texts: Sequence[str]) -> BaseModel:
        return GenerateRequest(prompts=[text[:_PROBE_CHARS] for text in texts], max_new_tokens=8, raw=True)

    def answer(self, model: Model, batch: Batch, records: Sequence[Record], tokenizer: Tokenizer) -> list[Any]:
        return self.speak(model, batch, records, tokenizer, [None] * len(records))

    def speak(
        self,
        model: Model,
        batch: Batch,
        records: Sequence[Record],
        tokenizer: Tokenizer,
        hear: Sequence[Hear | None],
    ) -> list[Any]:
        if "lm" in batch.labels:
            return self._preferences(model, batch) if self._prefers else self._scores(model, batch, tokenizer)
        stream = batch.streams["source"]
        prompts = [part.tolist() for part in np.split(stream.ids, stream.offsets[1:-1])]
        limits = [int(record.get("max_new_tokens", self.options.max_new_tokens)) for record in records]
        wanted = [Sampling(**{key: record[key] for key in _SAMPLING if key in record}) for record in records]
        end = self._end(tokenizer)
        voices = [
            Speaker(tokenizer, end, record.get("stop", ()), heard) for record, heard in zip(records, hear, strict=True)
        ]
        found = generate(
            model, prompts, limits, {end}, sampling=wanted, ended=lambda index, so_far: voices[index](so_far)
        )
        return [_continuation(one, voice, end) for one, voice in zip(found, voices, strict=True)]

    def _preferences(self, model: Model, batch: Batch) -> list[Preference]:
        pairs = self.forward(model, batch)["preference"].double().reshape(-1, 2).tolist()
        known = batch.masks.get("reference", np.zeros(len(pairs), bool))
        before = batch.labels.get("reference", np.zeros((len(pairs), 2)))
        return [
            Preference(chosen, rejected, (float(before[i, 0]), float(before[i, 1])) if known[i] else None)
            for i, (chosen, rejected) in enumerate(pairs)
        ]

    def _scores(self, model: Model, batch: Batch, tokenizer: Tokenizer) -> list[Score]:
        losses = self.item_losses(self.forward(model, batch), batch)["lm"].double().cpu().numpy()
        stream = batch.streams["source"]
        owner = np.repeat(stream.example, stream.lengths)[batch.masks["lm"]]
        nll = np.bincount(owner, weights=losses, minlength=batch.num_examples)
        tokens = np.bincount(owner, minlength=batch.num_examples)
        answers: list[tuple[int, ...] | None] = [None] * batch.num_examples
        if self.options.write_answers:
            masks = np.split(batch.masks["lm"], stream.offsets[1:-1])
            texts = np.split(stream.ids, stream.offsets[1:-1])
            prompts = [ids[: int(mask.argmax()) + 1].tolist() for ids, mask in zip(texts, masks, strict=True)]
            found = generate(model, prompts, self.options.max_new_tokens, {self._end(tokenizer)})
            answers = [tuple(one.ids) for one in found]
        return [Score(float(a), int(b), c) for a, b, c in zip(nll, tokens, answers, strict=True)]

    def render(self, answer: Continuation | Score | Preference, request: BaseModel | None = None) -> dict[str, Any]:
        if isinstance(answer, Score):
            return {"loss": answer.nll / max(answer.tokens, 1), "tokens": answer.tokens}
        if isinstance(answer, Preference):
            return {"chosen": answer.chosen, "rejected": answer.rejected}
        shown = {"text": answer.text, "finish_reason": answer.finish_reason, "tokens": len(answer.ids)}
        raw = isinstance(request, GenerateRequest) and request.raw
        return {**shown, "logprobs": self.evidence(answer)} if raw else shown

    def evidence(self, answer: Continuation | Score | Preference) -> dict[str, float]:
        if isinstance(answer, Score):
            return {"nll": answer.nll}
        if isinstance(answer, Preference):
            return {"chosen": answer.chosen, "rejected": answer.rejected}
        return {f"{i}:{token}": value for i, (token, value) in enumerate(zip(answer.ids, answer.logprobs, strict=True))}

    def item_scores(self, answers: Sequence[Any], records: Sequence[Record]) -> np.ndarray:
        """The mean log-likelihood of a row's tokens, in nats; of a preference, whether it is the right way round."""
        if self._prefers:
            return np.array([float(answer.chosen > answer.rejected) for answer in answers])
        return np.array([-answer.nll / answer.tokens if answer.tokens else np.nan for answer in answers])

    def evaluate(self, answers: Sequence[Any], records: Sequence[Record]) -> Metrics:
        if self._prefers:
            return preference.evaluate(list(answers), self.options.beta, self.options.label_smoothing)
        nll: Float[np.ndarray, "row"] = np.array([answer.nll for answer in answers])
        tokens = np.array([answer.tokens for answer in answers])
        if not tokens.sum():
            raise UserError("there is no token to score", hint="give longer texts, or a larger options.max_length")
        loss = float(nll.sum() / tokens.sum())
        interval = metrics.bootstrap(lambda rows: float(nll[rows].sum() / tokens[rows].sum()), len(nll))
        values = {"loss": loss, "perplexity": math.exp(loss), "tokens": float(tokens.sum())}
        written = [answer.answer for answer in answers if answer.answer is not None]
        if written:
            values |= {f"distinct_{n}": metrics.distinct(written, n) for n in (1, 2)}
        return Metrics(values, {"loss": interval, "perplexity": (math.exp(interval[0]), math.exp(interval[1]))}, {})


def _continuation(one: Generated, voice: Speaker, end: int) -> Continuation:
    text = voice.finish(one)
    ended = "end" if one.ids and one.ids[-1] == end else "length"
    return Continuation(text, tuple(one.ids), tuple(one.logprobs), "stop" if voice.stopped else ended)


def _groups(records: Iterator[Record], size: int) -> Iterator[list[Record]]:
    while group := list(islice(records, size)):
        yield group


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _nonempty(ids: list[int]) -> list[int]:
    if not ids:
        raise UserError("an empty prompt", hint="give at least one character")
    return ids
