"""Rows of text, instructions or dialogues as tokens, and which of these are learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from lexmill.data.batch import IGNORE
from lexmill.data.chat import ChatTemplate, Message, checked
from lexmill.data.columns import TEXTS, Role
from lexmill.errors import UserError

ROLES = (
    Role("messages", ("messages", "conversations"), required=False),
    Role("instruction", ("instruction",), required=False, unless=("messages",)),
    Role("input", ("input",), required=False, blank=True, beside=("instruction",)),
    Role("output", ("output", "response", "answer"), input=False, required=False, beside=("instruction",)),
    Role("chosen", ("chosen",), input=False, required=False, beside=("rejected",)),
    Role("rejected", ("rejected",), input=False, required=False, beside=("chosen",)),
    Role("text", ("prompt", *TEXTS), shape="text", unless=("messages", "instruction")),
    Role("text_pair", input=False, required=False, unless=("messages", "instruction", "chosen")),
)
"""A text, or a prompt and its reply (`text_pair`), or an instruction with input and output, or the messages of a
dialogue; and for preferences a prompt with the chosen and the rejected reply."""


@dataclass(frozen=True)
class Learnt:
    """Tokens, and by token the one to be foretold after it, `IGNORE` where none is learnt."""

    ids: Int[np.ndarray, "tok"]
    labels: Int[np.ndarray, "tok"]


@dataclass(frozen=True)
class Dialogue:
    """How rows are put to a model.

    Args:
        columns: by role, out of `ROLES`.
        template: the chat template; None for a model that knows none.
        chat: whether a prompt is a user's turn of a dialogue, or plain text to continue.
        max_length: tokens a training text is cut to.
    """

    columns: Mapping[str, str]
    template: ChatTemplate | None
    chat: bool
    max_length: int

    def prompt(self, record: Mapping[str, Any], tokenizer: Tokenizer) -> list[int]:
        """The tokens that an answer is to follow."""
        messages = self._messages(record)
        if messages is None:
            return tokenizer.encode(str(record[self.columns["text"]])).ids
        text = self._template.render(messages, answering=True)
        return tokenizer.encode(text, add_special_tokens=False).ids

    def learnt(self, record: Mapping[str, Any], tokenizer: Tokenizer, end: int) -> Learnt:
        """A training row: every token of a plain text; of a prompt with a reply or a dialogue, the replies alone."""
        if self._messages(record) is not None and "messages" in self.columns:
            return self._turns(self._messages(record) or [], tokenizer)
        role = "output" if "instruction" in self.columns else "text_pair"
        if role in self.columns:
            return self.reply(record, str(record[self.columns[role]]), tokenizer, end)
        if "instruction" in self.columns:
            raise UserError("there are instructions without answers", hint="name their column: --column output=NAME")
        return self._whole([], [*tokenizer.encode(str(record[self.columns["text"]])).ids, end])

    def reply(self, record: Mapping[str, Any], reply: str, tokenizer: Tokenizer, end: int) -> Learnt:
        """The prompt of a row with this reply, which is learnt."""
        messages = self._messages(record)
        if messages is not None:
            return self._turns([*messages, {"role": "assistant", "content": reply}], tokenizer)
        prompt = self.prompt(record, tokenizer)
        return self._whole(prompt, [*tokenizer.encode(reply, add_special_tokens=False).ids, end])

    def _whole(self, prompt: Sequence[int], reply: Sequence[int]) -> Learnt:
        ids = np.array([*prompt, *reply][: self.max_length], np.int64)
        labels = np.append(ids[1:], IGNORE)
        labels[: max(len(prompt) - 1, 0)] = IGNORE
        return Learnt(ids, labels)

    def _turns(self, messages: Sequence[Message], tokenizer: Tokenizer) -> Learnt:
        """All of the assistant's turns are learnt, each with the token that ends it."""
        text, spans = self._template.learnt(messages)
        found = tokenizer.encode(text, add_special_tokens=False)
        inside = np.zeros(len(found.ids), bool)
        starts, ends = np.array(found.offsets, np.int64).reshape(-1, 2).T
        for start, stop in spans:
            inside |= (starts >= start) & (ends <= stop)
        ids = np.array(found.ids, np.int64)
        labels = np.append(np.where(inside, ids, IGNORE)[1:], IGNORE)[: self.max_length]
        labels[-1] = IGNORE
        return Learnt(ids[: self.max_length], labels)

    def _messages(self, record: Mapping[str, Any]) -> list[dict[str, str]] | None:
        """The turns before the answer; None where a row is plain text."""
        given = record.get(self.columns.get("messages", "messages"))
        if given is not None:
            return checked(given)
        if not self.chat:
            return None
        if "instruction" not in self.columns:
            return [{"role": "user", "content": str(record[self.columns.get("text", "text")])}]
        parts = (record.get(self.columns.get(role, role)) for role in ("instruction", "input"))
        return [{"role": "user", "content": "\n".join(str(part) for part in parts if part)}]

    @property
    def _template(self) -> ChatTemplate:
        if self.template is None:
            hint = "start from a model that has one, or set options.chat_template"
            raise UserError("the model has no chat template, so a dialogue cannot be put to it", hint=hint)
        return self.template
