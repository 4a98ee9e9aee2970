"""Data, task, model, training, evaluation: composed into an artefact."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lexmill import models
from lexmill.adapt import ADAPTER, Adapted, adapt, save_adapted
from lexmill.artifact import (
    Artifact,
    Manifest,
    Metric,
    TaskRecord,
    Transform,
    Writer,
    create,
    refuse_existing,
    render_card,
)  # fmt: skip
from lexmill.config import to_dict
from lexmill.data.tokenizer import check_vocabulary
from lexmill.engine import TorchEngine
from lexmill.engine.files import environment, write_model
from lexmill.engine.loaded import Loaded
from lexmill.errors import Failure, MissingExtra, UserError
from lexmill.evaluate import Evaluation, answered, evaluate, metrics_of
from lexmill.fit.config import FitConfig
from lexmill.fit.keep import keeping_effect, kept
from lexmill.fit.model import Start, start
from lexmill.fit.prepare import Prepared, Subset, ask_first, examples, fingerprints, held_out, prepare, records
from lexmill.fit.record import record_inputs
from lexmill.hardware import describe, device, keep_heap, multiplies_fast
from lexmill.models import Model
from lexmill.monitor import Fanout, JsonlSink, Sink, open_trackers, read_events
from lexmill.train import HeadStart, Store, Trainer, TrainResult
from lexmill.train.step import ARITHMETIC

CARD_FILE = "card.md"
EVENTS_FILE = "run/events.jsonl"
EVALUATION_FILE = "run/evaluation.json"
REPORT_FILE = "run/report.html"


@dataclass(frozen=True)
class Watch:
    """Who follows a run: `note` is told in words what happens, `sinks` get every event."""

    note: Callable[[str], None] = lambda line: None
    sinks: Sequence[Sink] = ()


@dataclass(frozen=True)
class FitResult:
    """A finished run; all of it stands in the artefact.

    Args:
        seconds: from the first look at the data to the finished artefact.
    """

    artifact: Artifact
    seconds: float

    @property
    def training(self) -> Mapping[str, float]:
        return self.artifact.manifest.history[-1].effect

    @property
    def test(self) -> dict[str, Any] | None:
        """What `Evaluation.to_dict` gave on the test rows."""
        file = self.artifact.path / EVALUATION_FILE
        return json.loads(file.read_text()) if file.is_file() else None

    def to_dict(self) -> dict[str, Any]:
        training = dict(self.training)
        return {"artifact": str(self.artifact.path), "seconds": self.seconds, "training": training, "test": self.test}

    def lines(self) -> list[str]:
        t = self.training
        speed = (
            f"trained {t['steps']:,.0f} steps in {t['seconds']:.0f} s: {t['examples_per_second']:.1f} examples/s, "
            f"{t['ceiling_share']:.0%} of the matrix-multiply ceiling, {t['positions_per_token']:.2f} positions a token"
        )
        metrics = self.artifact.manifest.metrics.get("test", {})
        tested = [f"test {name}: {_with_interval(metric)}" for name, metric in metrics.items()]
        return [speed, *(tested or ["not tested: no --test was given"]), f"wrote {self.artifact.path}"]


def _with_interval(metric: Metric) -> str:
    if metric.interval is None:
        return f"{metric.value:.4f}"
    return f"{metric.value:.4f} (95 % interval {metric.interval[0]:.4f} to {metric.interval[1]:.4f})"


def fit(
    config: FitConfig,
    out: str | Path,
    *,
    resume: bool = False,
    watch: Watch | None = None,
    origins: Mapping[str, str] | None = None,
) -> FitResult:
    """Fine-tune a model on labelled text and write an artefact.

    Args:
        out: where the artefact goes; must not exist. Until it is complete the run lives in `OUT.partial/`.
        resume: go on from the last checkpoint of an interrupted run with the same config.
        origins: where each config value came from, for the record.

    Raises:
        UserError: for anything wrong with the config, the data, the model directory or `out`.
    """
    out, watch, started = Path(out), watch or Watch(), time.perf_counter()
    refuse_existing(out, resume=resume)
    keep_heap()
    where = device(config.train.device)
    prepared = prepare(config, origins)
    for line in (*prepared.columns.lines(), *prepared.report.lines()):
        watch.note(line)
    size = prepared.tokenizer.get_vocab_size()
    if prepared.trained_tokenizer:
        watch.note(f"trained a {config.tokenizer.kind} tokenizer of {size:,} tokens on the training text")
    anew = size if prepared.anew else None
    begun = start(prepared.model_directory, prepared.task, config.train, watch.note, anew=anew)
    begun.model.to(where)
    if where.type != "cpu":
        watch.note(f"training on {where}: {describe()['cuda']}")
    if not multiplies_fast(ARITHMETIC[config.train.precision], where):
        watch.note(f"this CPU has no {config.train.precision} products: the run will be many times slower than in fp32")
    check_vocabulary(prepared.tokenizer, begun.model.config.vocab_size, where=str(prepared.model_directory))
    prepared = ask_first(prepared, begun.model)
    with create(out, resume=resume) as writer:
        if writer.manifest is None:
            data = fingerprints(prepared)
            record_inputs(writer, config, origins or {}, data, watch.note)
            writer.manifest = _Run(prepared, begun, data, writer, watch).run()
    return FitResult(Artifact.open(out), time.perf_counter() - started)


@dataclass
class _Run:
    """Training and what follows it, inside an open writer."""

    prepared: Prepared
    begun: Start
    data: Mapping[str, Any]
    writer: Writer
    watch: Watch

    @property
    def model(self) -> Model:
        return self.begun.model

    @property
    def loaded(self) -> Loaded:
        return Loaded(self.prepared.task, self.model, self.prepared.tokenizer, self.writer.out.name)

    @cached_property
    def _examples(self) -> tuple[Subset, np.ndarray]:
        """The examples to train on, and the indices of the rows held out."""
        return examples(self.prepared)

    def _engine(self) -> TorchEngine:
        return TorchEngine(self.loaded, device=str(self.model.device))

    def run(self) -> Manifest:
        adapted = adapt(self.model, self.prepared.config.adapt)
        if adapted.trained < adapted.total:
            share = f"{adapted.trained / adapted.total:.2%}"
            self.watch.note(f"training {adapted.trained:,} of {adapted.total:,} weights ({share})")
        self._refuse_no_room()
        if adapted.stored is not None:
            before, after = adapted.stored
            self.watch.note(f"the matrices of the layers take {after:,} bytes in place of {before:,}")
        with ExitStack() as ending:
            training, start, tracked = self._train(adapted, ending)
            effect = (
                training.effect()
                | self._finish(adapted, training)
                | keeping_effect(start, training)
                | self._calibrate()
            )
            effect |= self._began()
            test = self._test()
            if test is not None:
                tracked.emit({"phase": "test", "step": training.steps, **test.metrics.values})
        self.model.cpu()
        write_model(self.writer, self.loaded, self.prepared.tokenizer_files)
        if test is not None:
            self.writer.path(EVALUATION_FILE).write_text(json.dumps(test.to_dict()), "utf-8")
        self._report(training, test)
        manifest = self._manifest(effect, test)
        self.writer.path(CARD_FILE).write_text(render_card(manifest, self.writer.out.name), "utf-8")
        return manifest

    def _refuse_no_room(self) -> None:
        room, asked = self.model.trunk.max_tokens, self.prepared.max_tokens or 0
        taken = self.model.config.max_positions - room
        if taken and asked > room:
            hint = f"give at most {room}, or fewer adapt.tokens"
            raise UserError(
                f"texts of {asked} tokens and {taken} in front of them", where="options.max_length", hint=hint
            )

    def _train(self, adapted: Adapted, ending: ExitStack) -> tuple[TrainResult, HeadStart, Sink]:
        """Also gives where the run is tracked, which is closed at `ending`."""
        prepared, config = self.prepared, self.prepared.config
        self.watch.note("tokenizing")
        data, held = self._examples
        if prepared.regroups:
            self.watch.note(f"{len(data):,} training examples of {data.lengths.mean():.0f} tokens in the mean")
        validating = len(held) > 0 or prepared.sources.validation is not None
        rows = held_out(prepared, held)
        store = Store(self.writer.checkpoints, config.train.keep_checkpoints)
        with kept(self.model, prepared.task, data, config, self.writer.partial, self.watch.note) as (data, start):
            trainer = Trainer(
                self.model,
                prepared.task,
                data,
                config.train,
                validate=(lambda: evaluate(self._engine(), rows()).metrics.values) if validating else None,
                store=store,
                start=start,
                companion=adapted.companion,
            )
            if trainer.resume():
                self.watch.note(f"going on from step {trainer.progress.step:,} of {trainer.total_steps:,}")
            last_step = trainer.progress.step - 1
            tracked = ending.enter_context(closing(self._tracked(last_step)))
            events = JsonlSink(self.writer.path(EVENTS_FILE), last_step=last_step)
            with closing(Fanout(events, *self.watch.sinks)) as sinks:
                return trainer.run(Fanout(sinks, tracked).emit), start, tracked

    def _tracked(self, last_step: int) -> Fanout:
        config, out = self.prepared.config, self.writer.out
        if not config.track.to:
            return Fanout()
        parts = {"options": config.options, "adapt": to_dict(config.adapt), "train": to_dict(config.train)}
        settings = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
        settings |= {"task": config.task, "model": config.model, "data.train": str(config.data.train)}
        folder = config.track.folder or out.parent / "tracking"
        self.watch.note(f"tracking by {', '.join(config.track.to)} in {folder}")
        return Fanout(*open_trackers(config.track.to, folder, out.name, settings, last_step=last_step))

    def _began(self) -> dict[str, float]:
        """What the task saw in the training rows, and what was made for this run that others find ready."""
        made = {code: float(count) for code, count in self.prepared.seen.items()}
        if self.prepared.anew:
            made["new_weights"] = float(self.begun.new)
        if self.prepared.trained_tokenizer:
            made["trained_tokens"] = float(self.prepared.tokenizer.get_vocab_size())
        return made

    def _finish(self, adapted: Adapted, training: TrainResult) -> dict[str, float]:
        """Write the adapter down and merge it; gives what adapting did. Raises `Failure` where it did nothing."""
        if not adapted.moved():
            if training.acted.get("overflowed_steps") == training.steps:
                hint = "train.precision=bf16 or fp32 does not overflow; more train.epochs let the scale fall further"
                raise Failure("every step overflowed in fp16", where="train.precision", hint=hint)
            raise Failure("adapting changed nothing", where="adapt", hint="raise train.learning_rate or train.epochs")
        effect = adapted.effect()
        if adapted.added:
            folder = self.writer.path(f"adapters/{ADAPTER}/adapter_config.json").parent
            try:
                save_adapted(adapted, folder, str(self.prepared.model_directory))
            except UserError as error:
                folder.rmdir()
                self.watch.note(f"the adapter is in the model, and not kept beside it: {error.message}")
        adapted.merge()
        return effect

    def _calibrate(self) -> dict[str, float]:
        """Let the task learn from the answers to the validation rows, where it does; gives what that did."""
        prepared = self.prepared
        if not prepared.calibrates:
            return {}
        self.watch.note("calibrating on the validation rows")
        _, held = self._examples
        asked, answers = answered(self._engine(), held_out(prepared, held)())
        task, effect = prepared.task.calibrate(answers, asked)
        self.prepared = replace(prepared, task=task)
        return effect

    def _test(self) -> Evaluation | None:
        test = self.prepared.sources.test
        if test is None:
            return None
        self.watch.note("evaluating on the test rows")
        return evaluate(self._engine(), records(test))

    def _report(self, training: TrainResult, test: Evaluation | None) -> None:
        from lexmill.evaluate.report import Report, write_report

        events = list(read_events(self.writer.path(EVENTS_FILE)))
        config = self.prepared.config
        summary = {
            "task": config.task,
            "model": f"{config.model}, {sum(p.numel() for p in self.model.parameters()) / 1e6:.1f} M parameters",
            "training data": f"{config.data.train}, {self.prepared.report.train.rows:,} rows",
            "test data": f"{config.data.test}, {test.rows:,} rows" if test else "none",
            "training": f"{training.epochs:g} epochs, {training.steps:,} steps, {training.seconds:.0f} s",
        }
        data = self.prepared.report.to_dict()
        try:
            report = Report(self.writer.out.name, summary, events, test.metrics if test else None, data)
            write_report(self.writer.path(REPORT_FILE), report)
        except MissingExtra as missing:
            self.watch.note(f"no HTML report: {missing}")

    def _manifest(self, effect: Mapping[str, float], test: Evaluation | None) -> Manifest:
        prepared = self.prepared
        return Manifest(
            task=TaskRecord(name=prepared.task.name, state=prepared.task.state()),
            structure=self.model.structure(),
            data=dict(self.data),
            metrics={"test": metrics_of(test)} if test else {},
            history=(
                *self.begun.history,
                Transform(name="fit", parameters=to_dict(prepared.config), effect=dict(effect)),
            ),
            environment=environment(),
            weights=models.weights_digest(self.model),
        )
