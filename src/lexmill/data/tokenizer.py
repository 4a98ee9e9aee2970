"""Tokenizers read from a directory, and what has to agree between a tokenizer and a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing

from lexmill.errors import UserError

FILES = ("tokenizer.json", "vocab.txt")
SPECIAL = ("cls", "sep", "pad", "unk", "mask", "bos", "eos")
_BERT = {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "unk": "[UNK]", "mask": "[MASK]"}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a directory, or of one `tokenizer.json` or `vocab.txt` (BERT WordPiece).

    Truncation and padding that the file sets are cleared: a task sets its own. Of `tokenizer_config.json`, a
    `vocab.txt` takes `do_lower_case` (default True), `strip_accents` and `tokenize_chinese_chars` (default True).

    Raises:
        UserError: no such file, or a broken one.
    """
    path = Path(path)
    file = path
    if path.is_dir():
        found = [path / name for name in FILES if (path / name).is_file()]
        if not found:
            raise UserError("no tokenizer in this directory", where=str(path), hint=f"needs {' or '.join(FILES)}")
        file = found[0]
    elif not path.is_file():
        raise UserError("no such tokenizer file or directory", where=str(path), hint="check the path")
    tokenizer = _from_vocabulary(file) if file.suffix == ".txt" else _from_json(file)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def fingerprint(tokenizer: Tokenizer) -> str:
    """The sha256 of all that decides how the tokenizer splits text; truncation and padding are not part of it."""
    state = json.loads(tokenizer.to_str())
    state["truncation"] = state["padding"] = None
    text = json.dumps(state, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, where: str | None = None) -> None:
    """Raise a `UserError` where the tokenizer has an id that a model of `vocab_size` embeddings does not know."""
    token, largest = max(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise UserError(
            f"the tokenizer gives '{token}' the id {largest}, but the model has {vocab_size} token embeddings",
            where=where,
            hint="use the tokenizer the model was trained with",
        )


def special_ids(tokenizer: Tokenizer, directory: str | Path | None = None) -> dict[str, int]:
    """Ids of the special tokens that exist, by name out of `SPECIAL`.

    They are named by `special_tokens_map.json` and `tokenizer_config.json` of `directory`; BERT's names stand in for
    `cls`, `sep`, `pad`, `unk` and `mask` where the files say nothing.
    """
    names: dict[str, str] = dict(_BERT)
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        config = _json_object(Path(directory) / file, required=False) if directory is not None else {}
        names |= _special_names(config)
    found = {role: tokenizer.token_to_id(name) for role, name in names.items()}
    return {role: token for role, token in found.items() if token is not None}


def _special_names(config: Mapping[str, Any]) -> dict[str, str]:
    names: dict[str, str] = {}
    for role in SPECIAL:
        value = config.get(f"{role}_token")
        name = value.get("content") if isinstance(value, dict) else value
        if isinstance(name, str):
            names[role] = name
    return names


def _json_object(file: Path, *, required: bool) -> dict[str, Any]:
    if not required and not file.is_file():
        return {}
    try:
        value = json.loads(file.read_bytes().decode())  # not of bytes, where the encoding would be guessed
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror or error}", where=str(file)) from error
    except json.JSONDecodeError as error:
        raise UserError(f"not JSON: {error.msg}", where=f"{file}:{error.lineno}", hint="copy the file again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8: {error.reason}", where=str(file), hint="copy the file again") from error
    if not isinstance(value, dict):
        raise UserError("holds no JSON object", where=str(file), hint="copy the file again")
    return value


def _from_json(file: Path) -> Tokenizer:
    state = _json_object(file, required=True)
    try:
        return Tokenizer.from_str(json.dumps(state))
    except Exception as error:  # the library raises nothing narrower
        hint = "it must be a tokenizer.json of the tokenizers library"
        raise UserError(f"not a tokenizer: {error}", where=str(file), hint=hint) from error


def _from_vocabulary(file: Path) -> Tokenizer:
    config = _json_object(file.parent / "tokenizer_config.json", required=False)
    names = _BERT | _special_names(config)
    try:
        lines = file.read_bytes().decode().removesuffix("\n").split("\n")  # not splitlines: U+2028 may be a token
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", where=str(file), hint="one token a line, in UTF-8") from error
    vocabulary = {token.removesuffix("\r"): index for index, token in enumerate(lines)}
    for role in ("cls", "sep", "unk"):
        if names[role] not in vocabulary:
            raise UserError(
                f"the vocabulary lacks '{names[role]}'", where=str(file), hint="only BERT's vocab.txt can be read"
            )
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token=names["unk"], max_input_chars_per_word=100))
    tokenizer.normalizer = BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = BertPreTokenizer()
    cls, sep = names["cls"], names["sep"]
    tokenizer.post_processor = BertProcessing((sep, vocabulary[sep]), (cls, vocabulary[cls]))
    tokenizer.decoder = WordPieceDecoder(prefix="##")
    special = [AddedToken(name, special=True, normalized=False) for name in names.values() if name in vocabulary]
    tokenizer.add_special_tokens(special)
    return tokenizer
