"""Hard negatives: of all the passages of a file, those that look right to a model and belong to other queries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from lexmill import models
from lexmill.artifact import refuse_existing
from lexmill.config import load as read_config
from lexmill.data import Source, find_columns, open_source
from lexmill.data.tokenizer import check_vocabulary, load_tokenizer
from lexmill.data.write import write_rows
from lexmill.engine import Loaded, TorchEngine, load
from lexmill.errors import UserError
from lexmill.fit import Watch, model_directory
from lexmill.monitor import Fanout, Sink
from lexmill.tasks import Embed
from lexmill.tasks.embed import KIND, EmbedOptions
from lexmill.tasks.texts import text_in

_ROWS, _PASSAGES = 512, 8192
"""How many of each are multiplied at once: what is in memory is this many scores."""


@dataclass(frozen=True)
class Mining:
    """How negatives are chosen among the passages that are none of a query's own, from the most similar on.

    Args:
        negatives: the most a row gets.
        skip_top: so many of the most similar are passed over.
        margin: a negative's cosine is at most this share below that of the row's own passage: higher ones may well be
            right (Moreira et al. 2024, NV-Retriever: positive-aware mining, by default at most 95 % of the positive's).
    """

    negatives: int = 4
    skip_top: int = 0
    margin: float = 0.05

    def __post_init__(self) -> None:
        if self.negatives < 1:
            raise UserError(f"{self.negatives} is no number of negatives", where="--negatives", hint="give at least 1")
        if self.skip_top < 0:
            raise UserError(f"{self.skip_top} cannot be passed over", where="--skip-top", hint="give 0 or more")
        if not 0 <= self.margin < 1:
            raise UserError(f"{self.margin} is no share", where="--margin", hint="give 0 or more, less than 1")


def mine(
    model: str,
    data: Path,
    out: Path,
    mining: Mining,
    *,
    columns: Mapping[str, str],
    encoding: str,
    skip_bad: bool,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Write the rows of a file of pairs, each with mined negatives after those it has.

    Args:
        model: an artefact of the task `embed`, or a model as `fit` takes it.
        columns: by role of `embed`; guessed otherwise.

    Raises:
        UserError: `out` exists, the model embeds nothing, pairs have scores, a row lacks a text, or no row has a
            negative.
    """
    refuse_existing(out, resume=True)
    source = open_source(data, encoding=encoding, skip_bad=skip_bad)
    found = find_columns(source, columns, Embed.roles)
    if "score" in found:
        where = f"{data}, column '{found['score']}'"
        raise UserError("pairs with scores have no use for negatives", where=where, hint="leave the column out")
    column = found.get("negatives", "negatives")
    pairs = _read(source, found)
    engine = _engine(model)
    with closing(Fanout(*(watch or Watch()).sinks)) as sinks:
        queries = _vectors(engine, pairs.queries, "query", sinks)
        passages = _vectors(engine, pairs.passages, "passage", sinks)
        chosen = hard_negatives(queries, passages, pairs.query, pairs.own, pairs.excluded(), mining, sinks)
    counts = np.array([len(one) for one in chosen])
    if not counts.any():
        hint = "lower --margin or --skip-top, or give more passages"
        raise UserError(f"none of {len(counts)} rows has a negative", where=str(data), hint=hint)

    def rows() -> Iterator[dict[str, Any]]:
        for row, held, places in zip(source, pairs.held, chosen, strict=True):
            yield {**row.values, column: [*held, *(pairs.passages[i] for i in places)]}

    written = write_rows(rows(), out)
    short = int((counts < mining.negatives).sum())
    return {"rows": written, "passages": len(pairs.passages), "mined": int(counts.sum()), "short": short}


@dataclass
class _Pairs:
    """The distinct texts of a file, and for each row its `query`, its `own` passage and the negatives it has already.
    Texts that differ only in the space around them are one."""

    queries: list[str] = field(default_factory=list[str])
    passages: list[str] = field(default_factory=list[str])
    query: list[int] = field(default_factory=list[int])
    own: list[int] = field(default_factory=list[int])
    held: list[list[str]] = field(default_factory=list[list[str]])

    def excluded(self) -> list[Int[np.ndarray, "some"]]:
        """For each row, the passages that are no negatives of it: all that its query has in any row, the query itself,
        and what the row has as negatives already."""
        places = {text.strip(): i for i, text in enumerate(self.passages)}
        right: dict[int, set[int]] = {}
        for query, own in zip(self.query, self.own, strict=True):
            right.setdefault(query, set()).add(own)
        found: list[np.ndarray] = []
        for query, held in zip(self.query, self.held, strict=True):
            texts = (text.strip() for text in (self.queries[query], *held))
            found.append(np.array(sorted(right[query] | {places[text] for text in texts if text in places})))
        return found


def _read(source: Source, columns: Mapping[str, str]) -> _Pairs:
    pairs = _Pairs()
    queries: dict[str, int] = {}
    passages: dict[str, int] = {}
    task = Embed(columns, EmbedOptions())
    for row in source:
        try:
            query, own = (text_in(row.values, columns[role]) for role in ("text", "text_pair"))
        except UserError as error:
            raise UserError(error.message, where=source.where(row.line), hint=error.hint) from error
        for text, known, kept, rows in (
            (query, queries, pairs.queries, pairs.query),
            (own, passages, pairs.passages, pairs.own),
        ):
            rows.append(known.setdefault(text.strip(), len(kept)))
            if rows[-1] == len(kept):
                kept.append(text)
        pairs.held.append(task.negatives(row.values))
    return pairs


def _engine(model: str) -> TorchEngine:
    """What embeds texts: an artefact of that task, or a pretrained model with the settings its files state."""
    path = Path(model)
    if (path / "manifest.json").is_file():
        loaded = load(path)
    else:
        directory = model_directory(model)
        options = read_config(EmbedOptions, stored=Embed.defaults(directory)).value
        columns = {"text": "text", "text_pair": "text_pair"}
        tokenizer, trunk = load_tokenizer(directory), models.load(directory)
        check_vocabulary(tokenizer, trunk.config.vocab_size, where=str(directory))
        loaded = Loaded(Embed(columns, options), trunk, tokenizer, directory.name)
    if not isinstance(loaded.task, Embed):
        hint = "give an artefact of the task 'embed', or a pretrained model"
        raise UserError(f"an artefact of the task '{loaded.task.name}' has no vectors", where=model, hint=hint)
    return TorchEngine(loaded)


def _vectors(engine: TorchEngine, texts: Sequence[str], kind: str, sink: Sink) -> Float[np.ndarray, "text dim"]:
    """The vector of each text, of length 1."""
    column = engine.task.state()["columns"]["text"]
    vectors: list[np.ndarray] = []
    for _, answer in engine.run_stream({column: text, KIND: kind} for text in texts):
        if isinstance(answer, Exception):
            raise answer
        vectors.append(answer[0])
        sink.emit({"phase": f"embed {kind}", "step": len(vectors), "steps": len(texts)})
    found = np.stack(vectors)
    return found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-12)


def hard_negatives(
    queries: Float[np.ndarray, "query dim"],
    passages: Float[np.ndarray, "passage dim"],
    query: Sequence[int],
    own: Sequence[int],
    excluded: Sequence[Int[np.ndarray, "some"]],
    mining: Mining,
    sink: Sink,
) -> list[list[int]]:
    """For each row the passages that `mining` chooses, most similar first. Exact; never holds all scores.

    Args:
        queries, passages: vectors of length 1.
        query, own: of each row, its query and its own passage.
        excluded: of each row, the passages that are none of its negatives, its own among them.
    """
    asked, right = np.asarray(query), np.asarray(own)
    chosen: list[list[int]] = []
    for start in range(0, len(asked), _ROWS):
        part = slice(start, start + _ROWS)
        vectors = queries[asked[part]]
        positive = (vectors * passages[right[part]]).sum(-1)
        limit = positive - mining.margin * np.abs(positive)
        chosen += _of_rows(vectors, passages, limit, excluded[part], mining)
        sink.emit({"phase": "mine", "step": len(chosen), "steps": len(asked)})
    return chosen


def _of_rows(
    vectors: Float[np.ndarray, "row dim"],
    passages: Float[np.ndarray, "passage dim"],
    limit: Float[np.ndarray, "row"],
    excluded: Sequence[Int[np.ndarray, "some"]],
    mining: Mining,
) -> list[list[int]]:
    wanted, count = mining.negatives + mining.skip_top, len(vectors)
    best = np.full((count, 0), -np.inf, vectors.dtype)
    places = np.zeros((count, 0), np.int64)
    above = np.zeros(count, np.int64)  # candidates too similar to be chosen, which are the first to be passed over
    row = np.repeat(np.arange(count), [len(one) for one in excluded])
    column = np.concatenate(excluded)
    for start in range(0, len(passages), _PASSAGES):
        scores = vectors @ passages[start : start + _PASSAGES].T
        here = (column >= start) & (column < start + scores.shape[1])
        scores[row[here], column[here] - start] = -np.inf
        high: Bool[np.ndarray, "row part"] = scores > limit[:, None]
        above += high.sum(1)
        scores[high] = -np.inf
        best = np.concatenate([best, scores], 1)
        places = np.concatenate([places, np.tile(np.arange(start, start + scores.shape[1]), (count, 1))], 1)
        if best.shape[1] > wanted:
            top = np.argpartition(-best, wanted - 1, axis=1)[:, :wanted]
            best, places = np.take_along_axis(best, top, 1), np.take_along_axis(places, top, 1)
    order = np.argsort(-best, axis=1, kind="stable")
    found: list[list[int]] = []
    for i, skipped in enumerate(np.maximum(mining.skip_top - above, 0).tolist()):
        ranked = order[i][np.isfinite(best[i][order[i]])]
        found.append(places[i][ranked[skipped : skipped + mining.negatives]].tolist())
    return found
