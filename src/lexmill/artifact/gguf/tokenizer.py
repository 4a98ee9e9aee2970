"""The tokenizer that a GGUF file describes, as `tokenizer.json` and `tokenizer_config.json`.

Two kinds: `gpt2`, byte-level BPE, and `llama`, the BPE of SentencePiece, whose merges are found again from the scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from lexmill.artifact.gguf.source import Source
from lexmill.errors import UserError

_CONTROL, _USER_DEFINED, _UNKNOWN = 3, 4, 2
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
    if pre.startswith(("qwen2", "deepseek-r1-qwen")):
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
