"""From a config to all that training needs: sources, columns, report, task, tokenizer, tokenized examples."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

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
from lexmill.data.check import DataReport, Finding, check, plain
from lexmill.data.tokenizer import FILES, fingerprint, load_tokenizer
from lexmill.data.tokenizer_training import save_tokenizer, train_tokenizer
from lexmill.errors import UserError
from lexmill.fit.config import TRAINED_TOKENIZER, DataConfig, FitConfig
from lexmill.fit.model import begins_anew, model_directory
from lexmill.models import Model
from lexmill.tasks import Record, Task, Wants, find

T = TypeVar("T")


@dataclass(frozen=True)
class Sources:
    """The files of a run; rows of each stream anew at each iteration."""

    train: Source
    validation: Source | None
    test: Source | None

    def all(self) -> list[Source]:
        return [source for source in (self.train, self.validation, self.test) if source is not None]


@dataclass(frozen=True)
class Prepared:
    """A run whose input has been looked at and found usable.

    Args:
        anew: whether the model gets new weights.
        tokenizer_files: the directory that the tokenizer is from: the model's, or that of one trained for this run.
        max_tokens: where its task cuts texts.
        calibrates: whether the task learns from validation rows after training.
        regroups: whether training examples are not rows; see `Wants`.
        seen: what the task found in the training rows, by code: how many of what that says.
    """

    config: FitConfig
    model_directory: Path
    anew: bool
    tokenizer_files: Path
    sources: Sources
    columns: Columns
    report: DataReport
    tokenizer: Tokenizer
    task: Task
    max_tokens: int | None
    calibrates: bool
    regroups: bool
    seen: Mapping[str, int]

    @property
    def trained_tokenizer(self) -> bool:
        return self.tokenizer_files != self.model_directory


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
    anew = begins_anew(directory, config.init)
    sources = _open(config.data)
    config.train.check(validating=sources.validation is not None or config.data.validation_fraction > 0)
    config.adapt.check()
    wants = task_type.wants(options)
    given: dict[str, str | tuple[str, ...]] = {**config.data.named()}
    if wants.label_columns:
        given["label"] = wants.label_columns
    columns = find_columns(sources.train, given, task_type.roles)
    if wants.labels == "none":
        columns = columns.unlabelled()
    columns = replace(columns, multi_label=columns.multi_label or wants.multi_label)
    files = _tokenizer_files(config, directory, sources.train, columns, anew=anew)
    tokenizer = load_tokenizer(files)
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
    task = _learn(task_type, sources.train, columns, options).for_tokenizer(tokenizer)
    remarks = {source: _inspect(task, source) for source in sources.all()}
    report = replace(report, findings=(*report.findings, *chain.from_iterable(remarks.values())))
    seen = {finding.code: finding.count for finding in remarks[sources.train]}
    _refuse_nothing_apart(wants, config, report)
    return Prepared(
        config, directory, anew, files, sources, columns, report, tokenizer, task, wants.max_tokens, bool(wants.apart),
        wants.regroups, seen,
    )  # fmt: skip


def _tokenizer_files(config: FitConfig, directory: Path, train: Source, columns: Columns, *, anew: bool) -> Path:
    """The directory of the model's tokenizer, or of one that is trained on the training text where the model is new and
    has none. That one is kept beside the token caches: a run that is resumed must have the very same."""
    has_own = any((directory / name).is_file() for name in FILES)
    if has_own and config.tokenizer != TRAINED_TOKENIZER:
        hint = "leave it out, or start from a directory without a tokenizer"
        raise UserError("the model has a tokenizer already", where="tokenizer", hint=hint)
    if has_own or not anew:
        return directory
    key = cache_key([train], "none", {"tokenizer": asdict(config.tokenizer), "columns": list(columns.texts)})
    files = cache_folder().parent / "tokenizers" / key
    if not files.is_dir():
        texts = (plain(row.values[name]) for row in train for name in columns.texts if row.values.get(name) is not None)
        tokenizer = train_tokenizer(texts, config.tokenizer, fewer=True)
        files.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=files.parent) as folder:
            whole = Path(folder) / "tokenizer"
            whole.mkdir()
            save_tokenizer(tokenizer, config.tokenizer, whole)
            whole.rename(files)
    return files


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
    return _reading(source, lambda rows: task.from_records((record for _, record in rows), columns, options))


def _inspect(task: Task, source: Source) -> list[Finding]:
    """What the task says of the rows of a file. An error about a record names its line."""
    found = _reading(source, lambda rows: list(task.inspect(rows)))
    named = f"{source.path.name}: "
    return [replace(finding, message=named + finding.message, path=str(source.path)) for finding in found]


def _reading(source: Source, use: Callable[[Iterator[tuple[str, Record]]], T]) -> T:
    """What is made of the rows of a file, each with its place, which errors about it name."""
    place = str(source.path)

    def read() -> Iterator[tuple[str, Record]]:
        nonlocal place
        for row in source:
            place = source.where(row.line)
            yield place, row.values
        place = str(source.path)

    try:
        return use(read())
    except UserError as error:
        raise UserError(error.message, where=place, hint=error.hint) from error


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
        return open_source(
            path,
            encoding=data.encoding,
            delimiter=data.delimiter,
            skip_bad=data.skip_bad,
            max_line_bytes=data.max_line_bytes,
        )

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


def ask_first(prepared: Prepared, model: Model) -> Prepared:
    """The task having asked the starting model what it wants to remember of it."""
    rows = (row.values for source in prepared.sources.all() for row in source)
    return replace(prepared, task=prepared.task.before(model, rows, prepared.tokenizer))


def tokenized(prepared: Prepared) -> TokenCache:
    """The training rows, tokenized once into a memory-mapped cache that later runs on the same rows share."""
    source, task, tokenizer = prepared.sources.train, prepared.task, prepared.tokenizer
    held = set(_held_before(prepared).tolist())
    without = {"held": sorted(held)} if held else {}
    key = cache_key([source], fingerprint(tokenizer), {"task": task.name, "state": task.state(), **without})
    rows = (row for i, row in enumerate(source) if i not in held)

    def encode(rows: list[Row]) -> list[Example]:
        try:
            return task.encode([row.values for row in rows], tokenizer, labelled=True)
        except UserError as error:
            if len(rows) == 1:
                raise UserError(error.message, where=source.where(rows[0].line), hint=error.hint) from error
        return [example for row in rows for example in encode([row])]

    return build_cache(cache_folder() / key, task.regroup(encode_chunks(rows, encode)), key)


def cache_folder() -> Path:
    """Where token caches live: `$LEXMILL_CACHE`, or the user's cache folder (XDG Base Directory Specification)."""
    named = os.environ.get("LEXMILL_CACHE")
    if named:
        return Path(named) / "tokens"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lexmill" / "tokens"


def examples(prepared: Prepared) -> tuple[Subset, np.ndarray]:
    """The examples to train on, and the indices of the rows held out for validation."""
    data = tokenized(prepared)
    if prepared.regroups:
        return Subset(data, np.arange(len(data))), _held_before(prepared)
    return split(data, prepared.config.data.validation_fraction, prepared.config.train.seed)


def split(data: TokenCache, fraction: float, seed: int) -> tuple[Subset, np.ndarray]:
    """The examples to train on, and the indices of the `fraction` held out, chosen by `seed` alone."""
    held = _choose(len(data), fraction, seed)
    return Subset(data, np.setdiff1d(np.arange(len(data)), held)), held


def _choose(count: int, fraction: float, seed: int) -> np.ndarray:
    order = np.random.default_rng(np.random.SeedSequence((seed, count))).permutation(count)
    return np.sort(order[: round(fraction * count)])


def _held_before(prepared: Prepared) -> np.ndarray:
    """The rows held out before examples are made of the others, where an example is not a row."""
    fraction, rows = prepared.config.data.validation_fraction, prepared.report.train.rows
    if not fraction or not prepared.regroups:
        return np.zeros(0, np.int64)
    held = _choose(rows, fraction, prepared.config.train.seed)
    if not 0 < len(held) < rows:
        hint = "give another share, or a file with --validation"
        raise UserError(f"holds out {len(held)} of {rows} texts", where="data.validation_fraction", hint=hint)
    return held


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
