"""The tokenizer that a GGUF file describes, as `tokenizer.json` and `tokenizer_config.json`.

Two kinds: `gpt2`, byte-level BPE, and `llama`, the BPE of SentencePiece, whose merges are found again from the scores.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from lexmill.artifact.gguf.source import Source
from lexmill.errors import UserError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}


def _plain(digits: bool) -> pre_tokenizers.PreTokenizer:
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level]) if digits else level


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_PRE = {
    "gpt-2": lambda: _plain(digits=False),
    "smollm": lambda: _plain(digits=True),
    "starcoder": lambda: _plain(digits=True),
    "llama-bpe": lambda: _split(_LLAMA3),
    "qwen2": lambda: _split(_QWEN2),
    "deepseek-r1-qwen": lambda: _split(_QWEN2),
}
"""How text is cut before merging, by `tokenizer.ggml.pre`."""
_COMPOSED = ("qwen2", "deepseek-r1-qwen")
"""Where accents and letters are put together first."""
_BOS_FIRST = ("llama-bpe",)
"""Where a text begins with the first token unless the file says otherwise."""


def rebuild(source: Source) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer and its `tokenizer_config.json`, the chat template among it.

    Raises:
        UserError: an unknown kind of tokenizer or of cutting, or a vocabulary that does not fit together.
    """
    kind = source.get("tokenizer.ggml.model", str)
    tokens: list[str] = source.get("tokenizer.ggml.tokens", list)
    if kind not in ("gpt2", "llama"):
        hint = "known: gpt2 (byte-level BPE), llama (SentencePiece BPE)"
        raise UserError(f"the tokenizer '{kind}' cannot be rebuilt", where=str(source.path), hint=hint)
    types: list[int] = source.get("tokenizer.ggml.token_type", list, [1] * len(tokens))
    try:
        tokenizer = _byte_level(source, tokens) if kind == "gpt2" else _sentence_piece(source, tokens, types)
    except Exception as error:  # the library raises nothing narrower
        if isinstance(error, UserError):
            raise
        raise UserError(f"the tokenizer does not fit together: {error}", where=str(source.path)) from error
    tokenizer.add_special_tokens([_added(tokens[i], special=True) for i, t in enumerate(types) if t == _CONTROL])
    tokenizer.add_tokens([_added(tokens[i], special=False) for i, t in enumerate(types) if t == _USER_DEFINED])
    names = {
        role: tokens[source.get(f"tokenizer.ggml.{theirs}_token_id", int)]
        for theirs, role in _ROLES.items()
        if f"tokenizer.ggml.{theirs}_token_id" in source.keys
    }
    _frame(source, tokenizer, names, kind)
    described: dict[str, Any] = {f"{role}_token": name for role, name in names.items()}
    if "tokenizer.chat_template" in source.keys:
        described["chat_template"] = source.get("tokenizer.chat_template", str)
    return tokenizer, {
        **described,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }


def special_ids(source: Source) -> dict[str, int]:
    """What `config.json` says of special tokens."""
    return {
        f"{role}_token_id": source.get(f"tokenizer.ggml.{theirs}_token_id", int)
        for theirs, role in _ROLES.items()
        if role != "unk" and f"tokenizer.ggml.{theirs}_token_id" in source.keys
    }


def _added(token: str, *, special: bool) -> AddedToken:
    return AddedToken(token, special=special, normalized=False)


def _byte_level(source: Source, tokens: Sequence[str]) -> Tokenizer:
    pre = source.get("tokenizer.ggml.pre", str, "gpt-2")
    if pre not in _PRE:
        hint = f"known ways: {', '.join(_PRE)}"
        raise UserError(f"the way '{pre}' of cutting text is unknown", where=str(source.path), hint=hint)
    pairs = [_pair(merge) for merge in source.get("tokenizer.ggml.merges", list)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocabulary, pairs, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = _PRE[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    if pre in _COMPOSED:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _sentence_piece(source: Source, tokens: Sequence[str], types: Sequence[int]) -> Tokenizer:
    scores: list[float] = source.get("tokenizer.ggml.scores", list)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges: list[tuple[float, int, int, str, str]] = []
    for token, score in zip(tokens, scores, strict=True):
        cuts = ((token[:i], token[i:]) for i in range(1, len(token)))
        merges += [(-score, vocabulary[a], vocabulary[b], a, b) for a, b in cuts if a in vocabulary and b in vocabulary]
    unknown = next((tokens[i] for i, kind in enumerate(types) if kind == _UNKNOWN), None)
    pairs = [(a, b) for *_, a, b in sorted(merges)]
    tokenizer = Tokenizer(BPE(vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = source.get("tokenizer.ggml.add_space_prefix", bool, True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _frame(source: Source, tokenizer: Tokenizer, names: dict[str, str], kind: str) -> None:
    """The special tokens before and after each text."""
    first = kind == "llama" or source.get("tokenizer.ggml.pre", str, "") in _BOS_FIRST
    wanted = {
        "bos": source.get("tokenizer.ggml.add_bos_token", bool, first),
        "eos": source.get("tokenizer.ggml.add_eos_token", bool, False),
    }
    level = [processors.ByteLevel(trim_offsets=False)] if kind == "gpt2" else []
    used = [role for role, is_wanted in wanted.items() if is_wanted]
    for role in used:
        if role not in names:
            raise UserError(f"names no {role} token, which begins or ends each text", where=str(source.path))
    if used:
        before = [names["bos"]] if wanted["bos"] else []
        after = [names["eos"]] if wanted["eos"] else []
        template = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *[f"{name}:1" for name in before], "$B:1", *[f"{name}:1" for name in after]],
            special_tokens=[(names[role], tokenizer.token_to_id(names[role])) for role in used],
        )
        tokenizer.post_processor = processors.Sequence([*level, template])
    elif level:
        tokenizer.post_processor = level[0]


# --- the other way ----------------------------------------------------------------------------------------------


def settings(directory: Path, size: int) -> dict[str, Any]:
    """The tokenizer of a Hugging Face directory as settings of a file: byte-level BPE, cut in a way that has a name.

    Args:
        size: token embeddings; where there are fewer tokens, unused ones make up the number.

    Raises:
        UserError: another kind of tokenizer, or another way of cutting text.
    """
    path = directory / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    told = json.loads(tokenizer.to_str())
    if told["model"]["type"] != "BPE" or told["model"].get("byte_fallback"):
        hint = "only byte-level BPE can be, as GPT-2, SmolLM, Qwen and LLaMA 3 have it"
        raise UserError("this kind of tokenizer cannot be written as GGUF", where=str(path), hint=hint)
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    types = dict.fromkeys(names, _NORMAL)
    for index, token in tokenizer.get_added_tokens_decoder().items():
        types[index] = _CONTROL if token.special else _USER_DEFINED
    described = _described(directory)
    found: dict[str, Any] = {
        "model": "gpt2",
        "pre": _pre(tokenizer, path),
        "tokens": [names.get(index, f"[PAD{index}]") for index in range(size)],
        "token_type": [types.get(index, _UNUSED) for index in range(size)],
        "merges": [" ".join(pair) for pair in told["model"]["merges"]],
    }
    ids = {theirs: tokenizer.token_to_id(described.get(f"{role}_token", "")) for theirs, role in _ROLES.items()}
    found |= {f"{theirs}_token_id": index for theirs, index in ids.items() if index is not None}
    plain = tokenizer.encode("a").ids
    found |= {"add_bos_token": plain[0] == ids["bos"], "add_eos_token": plain[-1] == ids["eos"]}
    settings = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    chat = described.get("chat_template")
    return settings | ({"tokenizer.chat_template": chat} if chat else {})


def _described(directory: Path) -> dict[str, str]:
    """The special tokens by role, and the chat template, of the files beside a `tokenizer.json`."""
    described: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            described |= json.loads((directory / name).read_text("utf-8"))
    if (directory / "chat_template.jinja").is_file():
        described["chat_template"] = (directory / "chat_template.jinja").read_text("utf-8")
    named = {key: value for key, value in described.items() if key.endswith("_token") or key == "chat_template"}
    plain = {key: value["content"] if isinstance(value, dict) else value for key, value in named.items()}
    return {key: value for key, value in cast("Mapping[str, Any]", plain).items() if isinstance(value, str)}


def _pre(tokenizer: Tokenizer, where: Path) -> str:
    """The name of the way in which a tokenizer cuts text before merging."""
    cut = _cutting(tokenizer)
    for name, build in _PRE.items():
        other = Tokenizer(BPE(ignore_merges=name == "llama-bpe"))
        other.pre_tokenizer = build()
        if name in _COMPOSED:
            other.normalizer = normalizers.NFC()
        if _cutting(other) == cut:
            return name
    raise UserError("cuts text in a way that has no name in GGUF", where=str(where), hint=f"known: {', '.join(_PRE)}")


def _cutting(tokenizer: Tokenizer) -> Any:
    """What decides how text is cut and merged, as JSON; offsets are of no matter here."""
    told = json.loads(
        tokenizer.to_str(), object_hook=lambda part: {k: v for k, v in part.items() if k != "trim_offsets"}
    )
    return told["normalizer"], told["pre_tokenizer"], bool(told["model"].get("ignore_merges"))
