"""The Python surface: the verbs of the command line as functions, with the same names and defaults.

Every function imports its room in its own body, so that looking at data costs no import of torch.
"""

from __future__ import annotations

import queue
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lexmill.errors import UserError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from lexmill.artifact import Artifact
    from lexmill.artifact.gguf import Imported
    from lexmill.compress import CompressResult
    from lexmill.data import Source
    from lexmill.data.augment import Edit
    from lexmill.data.check import DataReport
    from lexmill.data.tokenizer_training import TrainedTokenizer
    from lexmill.engine import Ensemble, Runtime
    from lexmill.evaluate import Comparison, Evaluation
    from lexmill.export import ExportResult
    from lexmill.fit import FitResult, Watch
    from lexmill.learn import SearchResult, Space
    from lexmill.tasks import Task
    from lexmill.verify import Verification


def fit(
    train: Path | str | None = None,
    *,
    out: Path | str,
    config: Path | str | None = None,
    task: str | None = None,
    model: Path | str | None = None,
    test: Path | str | None = None,
    validation: Path | str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    column: Mapping[str, str] | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    max_length: int | None = None,
    seed: int | None = None,
    encoding: str | None = None,
    skip_bad: bool = False,
    set: Sequence[str] | Mapping[str, Any] = (),
    resume: bool = False,
    watch: Watch | None = None,
) -> FitResult:
    """Fine-tune a model on labelled text and write an artefact. What is None comes from `config`, else the default.

    Args:
        train: labelled rows: CSV, TSV, JSONL (.gz, .xz), Parquet.
        out: the artefact to write; must not exist.
        config: a recipe in TOML.
        model: a Hugging Face directory, an artefact, or `minilm`.
        test: rows to evaluate on at the end; `validation`: rows to pick the best epoch by.
        text, text_pair, label: columns; guessed otherwise. `column` names others by role, e.g. `question`.
        set: any other key of the config, e.g. `{"train.warmup": 0.1}`.
        resume: go on with an interrupted run.
        watch: who follows the run; nobody by default.

    Raises:
        UserError: for anything wrong with what was given; it names the place.
        Failure: for what went wrong outside, such as a full disk.
    """
    from lexmill.config import load
    from lexmill.fit import FitConfig, fit

    flags: dict[str, Any] = {
        "data.train": train, "data.test": test, "data.validation": validation, "data.text": text,
        "data.text_pair": text_pair, "data.label": label,
        "data.columns": dict(column) if column else None, "data.encoding": encoding,
        "data.skip_bad": True if skip_bad else None, "task": task, "model": model, "train.epochs": epochs,
        "train.batch_size": batch_size, "train.learning_rate": learning_rate, "train.seed": seed,
        "options.max_length": max_length,
    }  # fmt: skip
    loaded = load(FitConfig, file=Path(config) if config is not None else None, sets=set, flags=flags)
    return fit(loaded.value, out, resume=resume, watch=watch, origins=loaded.origins)


def search(
    train: Path | str | None = None,
    *,
    out: Path | str,
    space: Space,
    trials: int = 20,
    jobs: int = 1,
    config: Path | str | None = None,
    task: str | None = None,
    model: Path | str | None = None,
    validation: Path | str | None = None,
    test: Path | str | None = None,
    set: Sequence[str] | Mapping[str, Any] = (),
    seed: int = 0,
    resume: bool = False,
    watch: Watch | None = None,
) -> SearchResult:
    """Find good settings by training with many. Keeps the best run's artefact, and tests that one.

    Args:
        out: the folder of the search; `resume` goes on with one that was interrupted.
        space: by config key a `Range` or a list of values, e.g. `{"train.learning_rate": Range(1e-5, 1e-3, log=True)}`.
        trials: how many settings are tried; `jobs` of them at a time.
        config: a recipe in TOML, for all that is not searched; `set` and the others as for `fit`.
        validation: rows to compare runs by; or `data.validation_fraction` in `set`.
        test: rows to test the best run on, once.
    """
    from lexmill.config import read_sets
    from lexmill.learn.search import Asked, search

    flags = {"data.train": train, "data.validation": validation, "data.test": test, "task": task, "model": model}
    settings = {key: str(value) for key, value in flags.items() if value is not None} | read_sets(set)
    asked = Asked(settings, space, Path(config) if config is not None else None)
    return search(asked, Path(out), trials=trials, jobs=jobs, seed=seed, resume=resume, watch=watch)


def combine(base: Path | str, adapters: Mapping[str, Path | str], *, out: Path | str) -> Artifact:
    """Put several adapters over one trunk, in one artefact.

    Args:
        base: what they were all fitted from: a Hugging Face directory, an artefact, or `minilm`.
        adapters: artefacts fitted from it by LoRA, by the name that each adapter shall have.
        out: the artefact to write; must not exist.

    Raises:
        UserError: an artefact has no adapter, or was fitted from something else.
    """
    from lexmill.fit.combine import combine

    return combine(str(base), {name: Path(path) for name, path in adapters.items()}, out)


def compress(
    artifact: Path | str,
    *,
    out: Path | str,
    steps: Sequence[str | Mapping[str, Any]] = (),
    config: Path | str | None = None,
    max_drop: float | None = None,
    goal: Mapping[str, Any] | None = None,
    data: Path | str | None = None,
    validation: Path | str | None = None,
    test: Path | str | None = None,
    unlabelled: Path | str | None = None,
    seed: int | None = None,
    search: Path | str | None = None,
    resume: bool = False,
    watch: Watch | None = None,
) -> CompressResult:
    """Make a model smaller or faster, by a chain of methods or a search for one, and prove what that costs.

    Args:
        out: the artefact to write; must not exist.
        steps: methods in order, each as `METHOD,KEY=VALUE,…` or as a mapping with the key `method`; where there are
            none, a search on this machine finds them.
        config: the chain or the goal, and all else, in TOML.
        max_drop: the largest loss of the mean score a row; where the paired 95 % interval goes beyond, nothing is
            written. A search needs it.
        goal: what a search is to reach beside that, by the names of `lexmill.compress.Goal`, e.g. `{"p99_ms": 10}`.
        data, validation, test: rows to learn from, to choose on, and for the proof; those of `fit` otherwise.
        unlabelled: rows without labels that distillation learns from.
        search: the folder that keeps what a search tries; `OUT.search` otherwise.
        resume: go on with the search that is kept there, or ask it for another goal.

    Raises:
        UserError: for an illegal order of steps, wrong options, missing or changed rows.
        Failure: the loss is not proved to be within `max_drop`, or nothing reached the goal.
    """
    from lexmill.compress import CompressConfig, compress, read_step
    from lexmill.config import load

    files = {"train": data, "validation": validation, "test": test, "unlabelled": unlabelled}
    flags: dict[str, Any] = {f"data.{part}": path for part, path in files.items()}
    chain = [read_step(step) if isinstance(step, str) else dict(step) for step in steps]
    flags |= {"steps": chain or None, "max_drop": max_drop, "seed": seed, "search": search}
    flags |= {f"goal.{name}": value for name, value in (goal or {}).items()}
    loaded = load(CompressConfig, file=Path(config) if config is not None else None, flags=flags)
    return compress(artifact, out, loaded.value, resume=resume, watch=watch)


def check(
    data: Path | str,
    *,
    test: Path | str | None = None,
    model: Path | str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    max_length: int = 128,
    encoding: str = "utf-8",
    skip_bad: bool = False,
) -> DataReport:
    """Look at data before training on it: rows, labels, duplicates, conflicts, overlap.

    Args:
        test: test rows, to look for overlap and unknown labels.
        model: whose tokenizer counts tokens; texts of more than `max_length` are then reported.
        text, text_pair, label: columns; guessed otherwise.
    """
    from lexmill.data import find_columns, open_source
    from lexmill.data.check import check

    source = open_source(data, encoding=encoding, skip_bad=skip_bad)
    other = open_source(test, encoding=encoding, skip_bad=skip_bad) if test is not None else None
    columns = find_columns(source, {"text": text, "text_pair": text_pair, "label": label})
    if model is None:
        return check(source, other, columns)
    from lexmill.data.tokenizer import load_tokenizer
    from lexmill.fit import model_directory

    tokenizer = load_tokenizer(model_directory(str(model)))
    return check(source, other, columns, tokenizer=tokenizer, max_tokens=max_length)


def tokenizer(
    data: Path | str,
    *,
    out: Path | str,
    kind: str = "bpe",
    vocab_size: int = 8000,
    special: str | None = None,
    lowercase: bool | None = None,
    text: str | Sequence[str] = (),
    encoding: str = "utf-8",
    skip_bad: bool = False,
    progress: Callable[[int], None] | None = None,
) -> TrainedTokenizer:
    """Train a tokenizer on text, read as a stream, and write it into a new directory.

    Args:
        out: the directory; must not exist.
        kind, vocab_size, special, lowercase: see `TokenizerConfig`.
        text: the column, or several; one is guessed otherwise.
        progress: told how many texts are read.

    Raises:
        UserError: for anything wrong with what was given, and where the text is too little for `vocab_size`.
    """
    from lexmill.config import load
    from lexmill.data.tokenizer_training import TokenizerConfig, write_tokenizer

    flags = {"kind": kind, "vocab_size": vocab_size, "special": special, "lowercase": lowercase}
    config = load(TokenizerConfig, flags=flags).value
    columns = (text,) if isinstance(text, str) else text
    return write_tokenizer(
        data, Path(out), config, text=columns, encoding=encoding, skip_bad=skip_bad, progress=progress
    )


@dataclass(frozen=True)
class OpenArtifact:
    """An artefact in memory, ready to answer; `load` makes it."""

    artifact: Artifact
    engine: Runtime | Ensemble

    def predict(self, texts: Sequence[Any], *, adapter: str | None = None, **options: Any) -> list[dict[str, Any]]:
        """One answer a text, as `POST /v1/{task}` gives it.

        Args:
            texts: what the task's request lists: texts, or pairs of them where the model was trained on pairs.
            adapter: which answers, where the artefact has several.
            options: the request's other fields, e.g. `top_k=3`.

        Raises:
            UserError: where the texts or options are not what the task takes.
        """
        task = self.engine.task_for(adapter)
        if not texts:
            return []
        request = self._request(task, texts, options)
        answers: list[dict[str, Any]] = []
        for _, answer in self.engine.run_stream(task.items(request), adapter=adapter):
            if isinstance(answer, Exception):
                raise answer
            answers.append(task.render(answer, request))
        return answers

    def stream(self, text: Any, **options: Any) -> Iterator[str]:
        """One answer in pieces, as they are written. It is written no further once the iterator is closed.

        Raises:
            UserError: as `predict`; or where the answers of this task come all at once.
        """
        from lexmill.engine import Request

        task = self.engine.task
        [record] = task.items(self._request(task, [text], options))
        pieces: queue.SimpleQueue[str | Exception | None] = queue.SimpleQueue()
        closed = threading.Event()

        def hear(piece: str) -> bool:
            pieces.put(piece)
            return not closed.is_set()

        def speak() -> None:
            try:
                [answer] = self.engine.run([Request(record, hear=hear)])
            except Exception as fault:  # noqa: BLE001 - raised where the pieces are asked for
                answer = fault
            pieces.put(answer if isinstance(answer, Exception) else None)

        speaking = threading.Thread(target=speak, name="lexmill-stream", daemon=True)
        speaking.start()
        try:
            while isinstance(piece := pieces.get(), str):
                yield piece
            if piece is not None:
                raise piece
        finally:
            closed.set()
            speaking.join()

    @staticmethod
    def _request(task: Task, texts: Sequence[Any], options: Mapping[str, Any]) -> BaseModel:
        from pydantic import ValidationError

        schema = task.Request
        try:
            return schema.model_validate({next(iter(schema.model_fields)): list(texts), **options})
        except ValidationError as error:
            fault = error.errors()[0]
            where = ".".join(map(str, fault["loc"]))
            raise UserError(fault["msg"], where=where, hint=f"it takes: {', '.join(schema.model_fields)}") from error

    def evaluate(
        self,
        data: Path | str,
        *,
        adapter: str | None = None,
        encoding: str = "utf-8",
        skip_bad: bool = False,
        report: Path | str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Evaluation:
        """Score the model on labelled rows; see `evaluate`."""
        from lexmill.data import open_source
        from lexmill.evaluate import evaluate

        if report is not None and not Path(report).parent.is_dir():
            raise UserError("there is no such directory", where=str(Path(report).parent), hint="make it first")
        source = open_source(data, encoding=encoding, skip_bad=skip_bad)
        lines = array("q")
        records = _noting_lines(source, lines)
        found = evaluate(
            self.engine, records, adapter=adapter, progress=progress, where=lambda i: source.where(lines[i])
        )
        if report is not None:
            from lexmill.evaluate.report import Report, write_report

            summary = {"artefact": str(self.artifact.path), "data": str(data), "rows": f"{found.rows:,}"}
            title = f"{self.artifact.path.name} on {source.path.name}"
            write_report(Path(report), Report(title, summary, [], found.metrics, None))
        return found

    def show(self) -> None:
        """Print what the artefact is, was made from and can do."""
        from lexmill.artifact import describe

        print("\n".join(describe(self.artifact)))


def _noting_lines(source: Source, lines: array[int]) -> Iterator[dict[str, Any]]:
    for row in source:
        lines.append(row.line)
        yield row.values


def augment(
    data: Path | str,
    *,
    out: Path | str,
    edits: Sequence[Edit] = ("swap", "delete", "keyboard"),
    copies: int = 1,
    share: float = 0.1,
    synonyms: Path | str | None = None,
    there: Path | str | None = None,
    back: Path | str | None = None,
    text: str | None = None,
    seed: int = 0,
    encoding: str = "utf-8",
    skip_bad: bool = False,
) -> dict[str, int]:
    """Write the rows of a file and changed copies of them, whose column `augmented` says how they came about.

    Args:
        out: JSON lines; must not exist.
        edits: `swap` neighbouring words, `delete` words, hit a neighbouring key (`keyboard`), or `synonym`.
        copies: a row; fewer where no edit changes its text.
        share: of a text's words (Chinese and Japanese: characters) that an edit changes.
        synonyms: a file of groups of words, one group a line, parted by commas.
        there, back: two artefacts that translate; texts go through both in place of being edited.
        text: the text column; guessed otherwise.

    Returns:
        How many rows were written, by how they came about; `original` for those of the file.
    """
    from lexmill.artifact import refuse_existing
    from lexmill.data import find_columns, open_source
    from lexmill.data.augment import MARK, Editor, augment, read_synonyms, rewrite
    from lexmill.data.write import write_rows

    refuse_existing(Path(out), resume=True)
    source = open_source(data, encoding=encoding, skip_bad=skip_bad)
    column = find_columns(source, {"text": text})["text"]
    rows = (row.values for row in source)
    if (there is None) != (back is None):
        raise UserError("back-translation needs two artefacts", where="augment", hint="give --there and --back")
    if there is not None and (synonyms is not None or copies != 1):
        hint = "leave out --there and --back, or the others"
        raise UserError("texts that are translated are not edited: copies and synonyms do nothing", hint=hint)
    if synonyms is not None and "synonym" not in edits:
        hint = "give --how synonym too, or leave out --synonyms"
        raise UserError("no edit uses the file of synonyms", where=str(synonyms), hint=hint)
    if there is not None and back is not None:
        steps = (load(there), load(back))
        made = rewrite(rows, column, lambda texts: _translated(steps, texts), "back-translation")
    else:
        words = read_synonyms(Path(synonyms)) if synonyms is not None else None
        made = augment(rows, column, Editor(tuple(edits), share, seed, words), copies)
    counts: Counter[str] = Counter()

    def counted() -> Iterator[dict[str, Any]]:
        for row in made:
            counts[row[MARK] or "original"] += 1
            yield row

    write_rows(counted(), Path(out))
    return dict(counts)


def _translated(steps: Sequence[OpenArtifact], texts: list[str]) -> list[str]:
    for step in steps:
        texts = [str(answer["text"]) for answer in step.predict(texts)]
    return texts


def label(
    artifact: Path | str,
    data: Path | str,
    *,
    out: Path | str,
    min_score: float = 0.9,
    others: Sequence[Path | str] | None = None,
    encoding: str = "utf-8",
    skip_bad: bool = False,
) -> dict[str, Any]:
    """Label the rows of which a model is sure enough, to train on them (Lee 2013, pseudo-labels).

    Args:
        out: JSON lines under the columns that the model was trained with, and `score`; must not exist.
        min_score: rows with a smaller probability are left out.
        others: more artefacts of an ensemble.

    Returns:
        `rows` read, `labelled` rows written, and how many of each label under `labels`.
    """
    from lexmill.learn.pseudo import label

    model = load(artifact, others=others or ())
    return label(model.engine, Path(data), Path(out), min_score, encoding=encoding, skip_bad=skip_bad)


def mine(
    model: Path | str,
    data: Path | str,
    *,
    out: Path | str,
    negatives: int = 4,
    skip_top: int = 0,
    margin: float = 0.05,
    column: Mapping[str, str] | None = None,
    encoding: str = "utf-8",
    skip_bad: bool = False,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Find hard negatives for pairs that belong together, so that `fit` learns `embed` from them.

    Args:
        model: an artefact of the task `embed`, or a pretrained model as `fit` takes it.
        out: JSON lines with the rows of `data`, and the negatives of each as a list; must not exist.
        negatives: the most a row gets, of the passages in `data` that are most similar to its query.
        skip_top: so many of the most similar are passed over, and all whose cosine is not below that of the row's own
            passage by the share `margin` (Moreira et al. 2024).
        column: columns by role; guessed otherwise.

    Returns:
        How many `rows` and distinct `passages` there are, how many negatives were `mined`, and how many rows are
        `short` of them.
    """
    from lexmill.learn.mine import Mining, mine

    mining = Mining(negatives, skip_top, margin)
    return mine(
        str(model), Path(data), Path(out), mining, columns=column or {}, encoding=encoding, skip_bad=skip_bad,
        watch=watch,
    )  # fmt: skip


def import_gguf(file: Path | str, *, out: Path | str, progress: Callable[[int], None] | None = None) -> Imported:
    """Make a Hugging Face directory of a GGUF file; `fit` takes it as its model.

    Args:
        out: must not exist.
        progress: told how many tensors are done.

    Raises:
        UserError: the file is broken, or of an architecture, quantisation or tokenizer that cannot be imported.
    """
    from lexmill.artifact.gguf import import_gguf

    return import_gguf(file, out, progress=progress)


def import_pretrained(
    source: Path | str,
    *,
    out: Path | str,
    base: Path | str | None = None,
    labels: Sequence[str] = (),
    pairs: bool = False,
) -> Artifact:
    """Write an artefact of a model that another program trained, as it stands.

    Args:
        source: a Hugging Face directory whose head classifies or scores texts, goes on with them, or that has none and
            embeds; or an adapter that `peft` wrote for such a model.
        out: the artefact to write; must not exist.
        base: what the adapter was trained on, a directory or `minilm`; by default where the adapter says it is.
        labels: names of the classes in the order of the head's outputs; by default those of `config.json`.
        pairs: the classes are those of two texts together, which the files do not say.

    Raises:
        UserError: it is neither; or its parts are missing, broken, do not fit each other, or cannot be represented.
    """
    from lexmill.fit.imports import import_pretrained

    named = None if base is None else str(base)
    return import_pretrained(Path(source), out, base=named, labels=labels, pairs=pairs)


def load(path: Path | str, *, others: Sequence[Path | str] = (), engine: str | None = None) -> OpenArtifact:
    """Open an artefact, its hashes checked, and load its model; with `others` an ensemble, whose answers are one.

    Args:
        engine: `torch` or `compiled`, or `onnx` or `openvino` for an artefact that `export` wrote. Where None, what the
            artefact names, or torch.

    Raises:
        UserError: where an artefact is damaged, or the others were not trained for the same answers.
    """
    from lexmill.artifact import Artifact
    from lexmill.engine import Ensemble, open_engine

    artifact = Artifact.open(Path(path))
    first = open_engine(artifact, engine)
    members = [first, *(open_engine(Path(other), engine) for other in others)]
    return OpenArtifact(artifact, Ensemble(members) if others else first)


def evaluate(
    artifact: Path | str,
    data: Path | str,
    *,
    adapter: str | None = None,
    others: Sequence[Path | str] | None = None,
    engine: str | None = None,
    encoding: str = "utf-8",
    skip_bad: bool = False,
    report: Path | str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Score a model on labelled data, with confidence intervals.

    Args:
        adapter: which answers, where the artefact has several.
        others: more artefacts of an ensemble.
        engine: see `load`.
        report: write an HTML report here.
        progress: told how many rows are done.

    Raises:
        UserError: with `file:line` for a row that cannot be scored, e.g. for a label that training never saw.
    """
    return load(artifact, others=others or (), engine=engine).evaluate(
        data, adapter=adapter, encoding=encoding, skip_bad=skip_bad, report=report, progress=progress
    )


def compare(
    first: Path | str,
    second: Path | str,
    data: Path | str,
    *,
    top: int = 20,
    encoding: str = "utf-8",
    skip_bad: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Comparison:
    """Let two artefacts of one task answer the same labelled rows: how much better the second is, and how sure that is.

    Args:
        top: how many of the rows they disagree on to keep.
        progress: told how many rows are done, once a model.

    Raises:
        UserError: their tasks, labels or columns differ, or a row cannot be scored.
    """
    from lexmill.data import open_source
    from lexmill.evaluate import compare

    one, other = load(first), load(second)
    source, lines = open_source(data, encoding=encoding, skip_bad=skip_bad), array("q")
    return compare(
        one.engine, other.engine, _noting_lines(source, lines), names=(str(first), str(second)), top=top,
        progress=progress, where=lambda i: source.where(lines[i]),
    )  # fmt: skip


def export(
    artifact: Path | str,
    *,
    out: Path | str,
    format: str = "onnx",
    set: Sequence[str] | Mapping[str, Any] = (),
    runtime: str | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> ExportResult:
    """Write an artefact that holds the same model for other programs too, checked on its probes.

    Args:
        artifact: an artefact, or a plain Hugging Face directory.
        out: the artefact to write; must not exist. The files are in its folder named like the format.
        set: options of the format, e.g. `{"opset": 20}`.
        runtime: what is to answer for the artefact where nobody names another; it is asked the probes too.
        note: is told what happens.

    Raises:
        UserError: the format cannot hold this model; MissingExtra: what writes it is not installed.
        Failure: what was written does not answer as its source does.
    """
    from lexmill.config import read_sets
    from lexmill.export import export

    options = dict(set) if isinstance(set, Mapping) else read_sets(set)
    return export(artifact, out, format, options, runtime=runtime, note=note)


def verify(artifact: Path | str, *, engine: str | None = None) -> Verification:
    """Check number by number that what was trained is what is stored and served. For `engine` see `load`."""
    from lexmill.verify import verify

    return verify(artifact, runtime=engine)


def serve(
    artifacts: Sequence[Path | str], *, host: str = "127.0.0.1", port: int = 8100, engine: str | None = None
) -> None:
    """Serve artefacts over HTTP until SIGINT or SIGTERM; port 0 picks a free one. For `engine` see `load`."""
    from lexmill.serve import serve

    serve(artifacts, host=host, port=port, runtime=engine)
