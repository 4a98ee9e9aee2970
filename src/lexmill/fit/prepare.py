"""From a config to all that training needs: sources, columns, report, task, tokenizer, tokenized examples."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from lexmill.config import load
from lexmill.data import (
    Batch,
    Columns,
    Example,
    Row,
    Source,
    TokenCache,
    build_cache,
    cache_key,
    data_fingerprint,
    encode_chunks,
    find_columns,
    open_source,
)  # fmt: skip
from lexmill.data.check import DataReport, check
from lexmill.data.tokenizer import fingerprint, load_tokenizer
from lexmill.errors import UserError
from lexmill.fit.config import DataConfig, FitConfig
from lexmill.fit.model import model_directory
from lexmill.tasks import Record, Task, Wants, find


@dataclass(frozen=True)
class Sources:
    """The files of a run; rows of each stream anew at each iteration."""

    train: Source
    validation: Source | None
    test: Source | None


@dataclass(frozen=True)
class Prepared:
    """A run whose input has been looked at and found usable; `max_tokens` is where its task cuts texts, and
    `calibrates` whether the task learns from validation rows after training."""

    config: FitConfig
    model_directory: Path
    sources: Sources
    columns: Columns
    report: DataReport
    tokenizer: Tokenizer
    task: Task
    max_tokens: int | None
    calibrates: bool = False


class Subset:
    """Some examples of a cache, by index."""

    def __init__(self, data: TokenCache, indices: np.ndarray) -> None:
        self.data, self.indices = data, indices
        self.lengths = data.lengths[indices]

    def __len__(self) -> int:
        return len(self.indices)

    def classes(self) -> np.ndarray:
        return self.data.classes()[self.indices]

    def batch(self, indices: np.ndarray) -> Batch:
        return self.data.batch(self.indices[indices])


def prepare(config: FitConfig, origins: Mapping[str, str] | None = None) -> Prepared:
    """Open and check everything a run reads. Raises `UserError` at the first thing that cannot work.

    Args:
        origins: where each config value came from, for errors.
    """
    task_type = find(config.task)
    directory = model_directory(config.model)
    options = _options(task_type, directory, config, (origins or {}).get("options", "default"))
    sources = _open(config.data)
    config.train.check_stopping(validating=sources.validation is not None or config.data.validation_fraction > 0)
    wants = task_type.wants(options)
    given: dict[str, str | tuple[str, ...]] = {**config.data.named()}
    if wants.label_columns:
        given["label"] = wants.label_columns
    columns = find_columns(sources.train, given, task_type.roles)
    if wants.labels == "none":
        columns = columns.unlabelled()
    columns = replace(columns, multi_label=columns.multi_label or wants.multi_label)
    tokenizer = load_tokenizer(directory)
    report = check(
        sources.train,
        sources.test,
        columns if wants.labels == "class" else columns.unlabelled(),
        validation=sources.validation,
        tokenizer=tokenizer,
        max_tokens=wants.max_tokens,
        apart=wants.apart,
    )
    for finding in report.findings:
        if finding.severity == "error":
            raise UserError(finding.message, where=finding.path, hint="; ".join(finding.examples) or None)
    task = _learn(task_type, sources.train, columns, options)
    _refuse_nothing_apart(wants, config, report)
    return Prepared(config, directory, sources, columns, report, tokenizer, task, wants.max_tokens, bool(wants.apart))


def _refuse_nothing_apart(wants: Wants, config: FitConfig, report: DataReport) -> None:
    """Before a long run, see that validation rows will have the labels that are learnt from them alone."""
    rows = report.validation or (report.train if config.data.validation_fraction else None)
    for label in wants.apart:
        if rows is None or not any(label in counts for counts in rows.labels.values()):
            raise UserError(
                f"no validation row has the label '{label}'",
                where=rows.path if rows else "data.validation",
                hint="give such rows with --validation, or data.validation_fraction of training rows that hold some",
            )


def _learn(task: type[Task], source: Source, columns: Columns, options: Any) -> Task:
    """The task, knowing its labels. An error about a record names its line."""
    line: int | None = None

    def read() -> Iterator[Record]:
        nonlocal line
        for row in source:
            line = row.line
            yield row.values
        line = None

    try:
        return task.from_records(read(), columns, options)
    except UserError as error:
        where = str(source.path) if line is None else source.where(line)
        raise UserError(error.message, where=where, hint=error.hint) from error


def _options(task: type[Task], directory: Path, config: FitConfig, origin: str) -> Any:
    """The task's options, checked as strictly as the rest of the config; what is not set, as the model's files say."""
    try:
        return load(task.Options, stored={**task.defaults(directory), **config.options}).value
    except UserError as error:
        where = "options" if origin == "default" else f"{origin}, options"
        raise UserError(error.message, where=where, hint=error.hint) from error


def _open(data: DataConfig) -> Sources:
    def one(path: Path | None) -> Source | None:
        if path is None:
            return None
        return open_source(path, encoding=data.encoding, delimiter=data.delimiter, skip_bad=data.skip_bad)

    train = one(data.train)
    assert train is not None
    if data.validation is not None and data.validation_fraction:
        raise UserError(
            "validation rows come from a file and from a share of the training rows",
            where="data.validation_fraction",
            hint="give one of the two",
        )
    return Sources(train, one(data.validation), one(data.test))


def records(source: Source) -> Iterator[Record]:
    """The rows of a source without their lines."""
    return (row.values for row in source)


def tokenized(prepared: Prepared) -> TokenCache:
    """The training rows, tokenized once into a memory-mapped cache that later runs on the same rows share."""
    source, task, tokenizer = prepared.sources.train, prepared.task, prepared.tokenizer
    key = cache_key([source], fingerprint(tokenizer), {"task": task.name, "state": task.state()})

    def encode(rows: list[Row]) -> list[Example]:
        try:
            return task.encode([row.values for row in rows], tokenizer, labelled=True)
        except UserError as error:
            if len(rows) == 1:
                raise UserError(error.message, where=source.where(rows[0].line), hint=error.hint) from error
        return [example for row in rows for example in encode([row])]

    return build_cache(cache_folder() / key, encode_chunks(source, encode), key)


def cache_folder() -> Path:
    """Where token caches live: `$LEXMILL_CACHE`, or the user's cache folder (XDG Base Directory Specification)."""
    named = os.environ.get("LEXMILL_CACHE")
    if named:
        return Path(named) / "tokens"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lexmill" / "tokens"


def split(data: TokenCache, fraction: float, seed: int) -> tuple[Subset, np.ndarray]:
    """The examples to train on, and the indices of the `fraction` held out, chosen by `seed` alone."""
    order = np.random.default_rng(np.random.SeedSequence((seed, len(data)))).permutation(len(data))
    held = np.sort(order[: round(fraction * len(data))])
    return Subset(data, np.sort(order[len(held) :])), held


def held_out(prepared: Prepared, held: np.ndarray) -> Callable[[], Iterator[Record]]:
    """The records for validation: of the file that was named, or the rows held out of training."""
    validation = prepared.sources.validation
    if validation is not None:
        return lambda: records(validation)
    chosen = set(held.tolist())
    return lambda: (r for i, r in enumerate(records(prepared.sources.train)) if i in chosen)


def fingerprints(prepared: Prepared) -> dict[str, Any]:
    """What the manifest says of each file."""
    parts = {"train": prepared.sources.train, "validation": prepared.sources.validation, "test": prepared.sources.test}
    return {name: data_fingerprint(source) for name, source in parts.items() if source is not None}
