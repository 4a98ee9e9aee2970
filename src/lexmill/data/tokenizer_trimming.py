"""A tokenizer with fewer pieces, under new ids, that splits texts of the pieces it kept as before."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from lexmill.errors import UserError

Characters = Literal["scripts", "all", "none"]
"""Which single characters a trimmed tokenizer keeps though they were not wanted: those of the scripts of what was
(signs, digits and bytes too), all, or none."""


class Trimmed(NamedTuple):
    """A tokenizer, and the old id of each new one, in order."""

    tokenizer: Tokenizer
    old_ids: Int[np.ndarray, "new"]


def trim(tokenizer: Tokenizer, wanted: Iterable[int], *, characters: Characters = "scripts") -> Trimmed:
    """Keep these pieces, those that special tokens and merges need, and single characters, so that what has lost its
    pieces can still be spelled.

    A text whose pieces are all kept is split into the same ones: a greedy or a most likely split does not change where
    other candidates go, and of merges all those stay that lead to a piece that is kept. One exception: a word that
    WordPiece found unknown, since nothing fitted behind a long piece, may be spelled once that piece is gone.

    Raises:
        UserError: the tokenizer is of a kind that has no list of pieces.
    """
    state: dict[str, Any] = json.loads(tokenizer.to_str())
    model = state["model"]
    kind = model.get("type")
    if kind not in ("WordPiece", "WordLevel", "BPE", "Unigram"):
        hint = "WordPiece, WordLevel, BPE and Unigram have one"
        raise UserError(f"a tokenizer of the kind '{kind}' has no list of pieces", hint=hint)
    by_id = _pieces(model, kind)
    added = {int(one["id"]) for one in state["added_tokens"]}
    kept = {index for index in wanted if index in by_id} | added | _named(state, by_id)
    if characters != "none":
        seen = {_script(one) for index in kept if index in by_id for one in by_id[index]}
        every = characters == "all" or kind == "BPE"  # whose characters may stand for bytes
        singles = {index: bare for index, piece in by_id.items() if len(bare := _bare(piece, model)) <= 1}
        kept |= {index for index, bare in singles.items() if every or not bare or _script(bare) in {None, *seen}}
    if kind == "BPE":
        kept |= _parts(model, by_id, kept)
    old = sorted(kept)
    new = {index: place for place, index in enumerate(old)}
    _write(model, kind, by_id, new)
    for one in state["added_tokens"]:
        one["id"] = new[int(one["id"])]
    _renumber(state["post_processor"], new)
    return Trimmed(Tokenizer.from_str(json.dumps(state)), np.array(old, np.int64))


def _pieces(model: Mapping[str, Any], kind: str) -> dict[int, str]:
    if kind == "Unigram":
        return {index: piece for index, (piece, _) in enumerate(model["vocab"])}
    return {index: piece for piece, index in model["vocab"].items()}


def _named(state: Mapping[str, Any], by_id: Mapping[int, str]) -> set[int]:
    """What the tokenizer itself leans on: the unknown token, bytes that stand in for characters."""
    model = state["model"]
    named = {model["unk_id"]} if model.get("unk_id") is not None else set[int]()
    if model["type"] == "Unigram":  # unknown characters are scored by the least likely piece
        named.add(min(by_id, key=lambda index: model["vocab"][index][1]))
    fallback = bool(model.get("byte_fallback"))
    return named | {
        index
        for index, piece in by_id.items()
        if piece == model.get("unk_token") or (fallback and len(piece) == 6 and piece.startswith("<0x"))
    }


def _bare(piece: str, model: Mapping[str, Any]) -> str:
    """A piece without the signs of where it stands in a word."""
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    return piece.removeprefix(prefix).removesuffix(suffix).removeprefix("▁")


def _script(character: str) -> str | None:
    """The script of a letter, which its Unicode name begins with ("CJK", "LATIN"); None for what is no letter."""
    return unicodedata.name(character, "").partition(" ")[0] if character.isalpha() else None


def _parts(model: Mapping[str, Any], by_id: Mapping[int, str], kept: set[int]) -> set[int]:
    """The pieces that merges make those that are kept of, and these of."""
    ids = {piece: index for index, piece in by_id.items()}
    made: dict[str, list[tuple[str, str]]] = {}
    for left, right in map(_pair, model["merges"]):
        made.setdefault(_merged(left, right, model), []).append((left, right))
    found = set[int]()
    open_ = [by_id[index] for index in kept if index in by_id]
    while open_:
        for pair in made.get(open_.pop(), ()):
            for piece in pair:
                if piece in ids and ids[piece] not in found:
                    found.add(ids[piece])
                    open_.append(piece)
    return found


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _merged(left: str, right: str, model: Mapping[str, Any]) -> str:
    return left + right.removeprefix(model.get("continuing_subword_prefix") or "")


def _write(model: dict[str, Any], kind: str, by_id: Mapping[int, str], new: Mapping[int, int]) -> None:
    own = {index: place for index, place in new.items() if index in by_id}
    if kind == "Unigram":
        model["vocab"] = [model["vocab"][index] for index in sorted(own)]
        if model.get("unk_id") is not None:
            model["unk_id"] = own[model["unk_id"]]
        return
    model["vocab"] = {by_id[index]: place for index, place in own.items()}
    if kind == "BPE":
        known = model["vocab"]
        pairs = ((merge, _pair(merge)) for merge in model["merges"])
        model["merges"] = [
            merge for merge, (a, b) in pairs if a in known and b in known and _merged(a, b, model) in known
        ]


def _renumber(processor: Any, new: Mapping[int, int]) -> None:
    """Put new ids into a post-processor, in place."""
    if not processor:
        return
    for inner in processor.get("processors", ()):
        _renumber(inner, new)
    for end in ("cls", "sep"):
        if end in processor:
            name, index = processor[end]
            processor[end] = [name, new[index]]
    for token in processor.get("special_tokens", {}).values() if processor["type"] == "TemplateProcessing" else ():
        token["ids"] = [new[index] for index in token["ids"]]
