"""Dialogues as the text a model was taught them in: the chat template that stands beside a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lexmill.errors import UserError

Message = Mapping[str, Any]
"""One turn: `role` (`system`, `user`, `assistant`) and `content`."""
_CONFIG, CHAT_FILE = "tokenizer_config.json", "chat_template.jinja"


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template as Hugging Face's tokenizers carry it, run in a sandbox.

    Args:
        source: the template.
        tokens: the special tokens it may name, e.g. `bos_token`.
    """

    source: str
    tokens: Mapping[str, str]

    @classmethod
    def read(cls, directory: Path) -> ChatTemplate | None:
        """The template of a model directory; None where it has none. Of several named ones, the one called default."""
        config: dict[str, Any] = {}
        if (directory / _CONFIG).is_file():
            config = json.loads((directory / _CONFIG).read_bytes().decode())
        source = config.get("chat_template")
        if isinstance(source, list):
            source = {one["name"]: one["template"] for one in source}.get("default")
        if (directory / CHAT_FILE).is_file():
            source = (directory / CHAT_FILE).read_text("utf-8")
        if not isinstance(source, str):
            return None
        named = {key: value for key, value in config.items() if key.endswith("_token")}
        plain = {key: value["content"] if isinstance(value, dict) else value for key, value in named.items()}
        return cls(source, {key: value for key, value in plain.items() if isinstance(value, str)})

    def render(self, messages: Sequence[Message], *, answering: bool) -> str:
        """The text of a dialogue; with `answering`, up to where the assistant's next turn begins.

        Raises:
            UserError: the template is broken, or refuses the dialogue.
        """
        try:
            template = _ENVIRONMENT.from_string(self.source)
            return template.render(
                messages=list(messages), add_generation_prompt=answering, raise_exception=_refuse, **self.tokens
            )
        except TemplateError as error:
            raise UserError(f"the chat template cannot render this dialogue: {error}", where="chat template") from error

    def learnt(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The text of a dialogue, and where in it the assistant's turns stand: from after what precedes an answer to
        the end of the turn, without white space behind it.

        Raises:
            UserError: a turn is rendered otherwise once others follow, so that what was learnt is never seen again.
        """
        whole = self.render(messages, answering=False)
        spans: list[tuple[int, int]] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:i], answering=True)
            after = self.render(messages[: i + 1], answering=False)
            if not (after.startswith(before) and whole.startswith(after)):
                hint = "split the dialogue, so that each row ends with the only answer to be learnt"
                raise UserError("the chat template changes a turn when others follow", where="chat template", hint=hint)
            spans.append((len(before), len(after.rstrip())))
        return whole, spans


def checked(messages: Any) -> list[dict[str, str]]:
    """The messages of a dialogue: a list of objects, each with `role` and `content` (or `from` and `value`, as ShareGPT
    has them). Anything else is a `UserError`."""
    hint = 'a dialogue is a list like [{"role": "user", "content": "Hello"}]'
    if not isinstance(messages, list) or not messages:
        raise UserError("is not a dialogue", where="messages", hint=hint)
    found: list[dict[str, str]] = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise UserError("holds a turn that is not an object", where="messages", hint=hint)
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        role = {"human": "user", "gpt": "assistant"}.get(str(role), role)
        if role not in ("system", "user", "assistant", "tool") or not isinstance(content, str):
            raise UserError(f"holds a turn of {role!r} that cannot be read", where="messages", hint=hint)
        found.append({"role": role, "content": content})
    return found


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


_ENVIRONMENT = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
)
_ENVIRONMENT.filters.update(tojson=_to_json)
