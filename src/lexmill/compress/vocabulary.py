"""Vocabulary trimming: a table of embeddings for the texts there are, and a tokenizer that goes with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import numpy as np
import torch
from annotated_types import Ge
from jaxtyping import Int
from tokenizers import Tokenizer

from lexmill.compress.base import Material, Method, Stage, register
from lexmill.data import open_source
from lexmill.data.batch import Example
from lexmill.data.tokenizer_trimming import Characters, Trimmed, trim
from lexmill.engine import Loaded
from lexmill.errors import UserError
from lexmill.models import Model
from lexmill.models.heads import LMHead
from lexmill.nn.embedding import Embedding
from lexmill.tasks import Record

_LINES = 1000
"""Texts of a file that are tokenized at a time."""


@dataclass(frozen=True)
class VocabularyOptions:
    """What may be set for `vocabulary`.

    Args:
        texts: files whose texts are to be read well too, beside the rows of training and those without labels; a
            column `text`, or plain lines.
        min_count: how often a piece must occur in all of them to be kept.
        size: keep no more than so many pieces that occur, the most frequent ones; None for all of them.
        characters: which single characters are kept though they do not occur, so that what has lost its pieces can be
            spelled: those of the scripts that do (signs, digits and bytes too), all, or none.
    """

    texts: tuple[str, ...] = ()
    min_count: Annotated[int, Ge(1)] = 1
    size: Annotated[int, Ge(1)] | None = None
    characters: Characters = "scripts"


@register
class Vocabulary(Method):
    """Drop the embeddings of pieces that do not occur (Abdaoui et al. 2020, Load What You Need). Texts whose pieces are
    all kept are answered as before, bit for bit; others are read in smaller pieces."""

    name: ClassVar[str] = "vocabulary"
    stage: ClassVar[Stage] = "vocabulary"
    Options: ClassVar[type] = VocabularyOptions
    after: ClassVar[Mapping[Stage, str]] = {"quantise": "since the table of embeddings is not whole any more"}

    def check(self, subject: Loaded, options: VocabularyOptions) -> None:
        if any(isinstance(head, LMHead) for head in subject.model.heads.values()):
            hint = "trim models that classify, tag, embed or answer"
            raise UserError(f"a model for '{subject.task.name}' would lose words to say", where="vocabulary", hint=hint)
        token: Any = subject.model.trunk.embeddings.token
        if subject.model.trunk.has_prompt or not isinstance(token, Embedding):
            raise UserError("the table of embeddings was changed", where="vocabulary", hint="trim it first")
        for path in options.texts:
            if not Path(path).is_file():
                raise UserError("no such file", where=f"vocabulary.texts: {path}", hint="check the path")

    def apply(self, subject: Loaded, material: Material, options: VocabularyOptions) -> tuple[Loaded, dict[str, float]]:
        self.check(subject, options)
        read, unseen = [*material.train, *material.unlabelled], list(material.validation)
        before = subject.model.config.vocab_size
        encoded = subject.task.encode(read, subject.tokenizer, labelled=False)
        counts = np.bincount(np.concatenate([*map(_ids, encoded)]), minlength=before)
        for path in options.texts:
            counts += _counted(path, subject.tokenizer, before)
        trimmed = trim(subject.tokenizer, _chosen(counts, options).tolist(), characters=options.characters)
        after = len(trimmed.old_ids)
        if after >= before:
            hint = "raise min_count, or set size; with characters=none single characters go too"
            raise UserError(f"all {before:,} pieces are wanted", where="vocabulary", hint=hint)
        outside = subject.task.encode(unseen, subject.tokenizer, labelled=False)
        _cut(subject.model, trimmed)
        found = replace(subject, task=subject.task.for_tokenizer(trimmed.tokenizer), tokenizer=trimmed.tokenizer)
        same = _same(found, read, encoded, trimmed)
        width = subject.model.trunk.embeddings.token.like.nbytes // after
        material.note(f"{after:,} of {before:,} pieces stay")
        return found, {
            "tokens_before": float(before),
            "tokens_after": float(after),
            "tokens_seen": float((counts > 0).sum()),
            "table_bytes_before": float(before * width),
            "table_bytes_after": float(after * width),
            "texts_read_otherwise": 1 - same,
            **_coverage(found, unseen, outside, trimmed),
        }


def _ids(example: Example) -> Int[np.ndarray, "tok"]:
    parts = [tokens.ids for stream in example.streams.values() for tokens in stream]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _counted(path: str, tokenizer: Tokenizer, size: int) -> Int[np.ndarray, "token"]:
    counts = np.zeros(size, np.int64)
    texts = (str(row.values[_column(row.values, path)]) for row in open_source(Path(path)))
    while some := list(islice(texts, _LINES)):
        ids = [one.ids for one in tokenizer.encode_batch_fast(some)]
        counts += np.bincount(np.concatenate([np.array(one, np.int64) for one in ids]), minlength=size)
    return counts


def _column(values: Mapping[str, Any], path: str) -> str:
    if "text" not in values:
        hint = f"it has: {', '.join(values)}"
        raise UserError("has no column 'text'", where=f"vocabulary.texts: {path}", hint=hint)
    return "text"


def _chosen(counts: Int[np.ndarray, "token"], options: VocabularyOptions) -> Int[np.ndarray, "kept"]:
    often = np.flatnonzero(counts >= options.min_count)
    if options.size is None or len(often) <= options.size:
        return often
    return often[np.argsort(-counts[often], kind="stable")[: options.size]]


@torch.no_grad()
def _cut(model: Model, trimmed: Trimmed) -> None:
    """Take the rows of the old ids in the model, in place; put the new ids into what is kept of its config."""
    trunk, old = model.trunk, torch.from_numpy(trimmed.old_ids)
    table, size = trunk.embeddings.token, trunk.config.vocab_size
    new = {index: place for place, index in enumerate(trimmed.old_ids.tolist())}
    if getattr(trunk.config, "position_offset", 0):
        padding = model.origin.config.get("pad_token_id", 1)
        if new.get(padding) != padding:
            raise UserError(
                f"the padding token would get another id than {padding}, and positions begin after that one",
                where="vocabulary",
                hint="give a tokenizer whose special tokens come first",
            )
    cut = Embedding(len(old), table.embedding_dim, sparse=table.sparse, role=table.role)
    cut.weight = torch.nn.Parameter(table.weight[old].clone(), requires_grad=table.weight.requires_grad)
    trunk.embeddings.token = cut
    trunk.config = replace(cast("Any", trunk.config), vocab_size=len(old))
    model.extras = {
        name: tensor[old].clone() if tensor.dim() and len(tensor) == size else tensor
        for name, tensor in model.extras.items()
    }
    model.origin.config = {
        key: _renumbered(value, new) if key.endswith("_token_id") else value
        for key, value in model.origin.config.items()
    }


def _renumbered(value: Any, new: Mapping[int, int]) -> Any:
    if isinstance(value, list):
        return [new[one] for one in cast("list[int]", value) if one in new]
    return new.get(value) if isinstance(value, int) else value


def _same(found: Loaded, rows: Sequence[Record], encoded: Sequence[Example], trimmed: Trimmed) -> float:
    """The share of rows that are read in the same pieces as before."""
    again = found.task.encode(rows, found.tokenizer, labelled=False)
    return float(np.mean([*_equal(encoded, again, trimmed)])) if rows else 1.0


def _equal(encoded: Sequence[Example], again: Sequence[Example], trimmed: Trimmed) -> Iterator[bool]:
    for old, new in zip(encoded, again, strict=True):
        yield np.array_equal(_ids(old), trimmed.old_ids[_ids(new)])


def _coverage(found: Loaded, rows: Sequence[Record], encoded: Sequence[Example], trimmed: Trimmed) -> dict[str, float]:
    """What becomes of rows that nothing was counted on: the share of their pieces that went, and of those rows that are
    read otherwise."""
    if not rows:
        return {}
    lost = ~np.isin(np.concatenate([*map(_ids, encoded)]), trimmed.old_ids)
    return {
        "unseen_pieces_lost": float(lost.mean()),
        "unseen_texts_read_otherwise": 1 - _same(found, rows, encoded, trimmed),
    }
