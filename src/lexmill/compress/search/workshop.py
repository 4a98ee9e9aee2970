"""Where candidates are made, asked and measured."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from lexmill.artifact import Artifact, Transform, create
from lexmill.compress.base import Material, Step
from lexmill.compress.chain import apply_chain, write
from lexmill.compress.config import CompressConfig
from lexmill.compress.measure import TOGETHER, Contestant, Cost, loaded_bytes, measure
from lexmill.compress.proof import judge, scored
from lexmill.compress.rows import Rows
from lexmill.compress.search.space import AS_IT_IS, Candidate, spelled
from lexmill.compress.search.trial import Ledger, Stage, Trial
from lexmill.engine import Loaded, Request, Runtime, batch_dependence, find_runtime, load, open_engine
from lexmill.errors import MissingExtra, UserError
from lexmill.export import find as find_format
from lexmill.tasks import Record

ROUNDS = 3
"""Turns of a candidate and the model as it was."""
DRY_ROWS = 64
"""Training rows of a step that is not to be trained, only measured."""
ROUND_SECONDS = 2.0
"""About what a stream of the model as it was may take in one round; it gets fewer texts where they are long."""
MOST_BATCH_ERROR = 1e-3
"""Beyond this, a text's numbers depend on the texts that it is asked with."""
TOGETHER_ROWS = 32
BARE: Mapping[str, Mapping[str, Any]] = {"int8": {"rescue": False, "max_error": 1e9}}
"""Of a step after one that was not trained: what answers are like means nothing."""


class OutOfTime(Exception):
    """The search's budget is spent."""


@dataclass(frozen=True)
class Built:
    """A candidate as a model: its weights, the engine that runs them, what it loads, and what was done to it."""

    loaded: Loaded
    contestant: Contestant
    history: Sequence[Transform]


class Workshop:
    """Makes candidates of one artefact and tries them; what was tried already is taken from the ledger.

    Args:
        original: the model as it is.
        material: what methods work with.
        deadline: the `time.monotonic()` after which nothing is begun, and training ends; None for none.
    """

    def __init__(
        self,
        artifact: Artifact,
        original: Loaded,
        rows: Rows,
        config: CompressConfig,
        ledger: Ledger,
        material: Material,
        deadline: float | None,
    ) -> None:
        self._artifact, self._config, self._ledger = artifact, config, ledger
        self._rows, self._deadline, self._told = rows, deadline, material.progress
        self._material = replace(material, progress=self._progress)
        self._original = Contestant.of(original)
        self._before = self._scores(self._original.engine)
        self._measured_on = self._short(rows.validation)

    @property
    def original(self) -> Contestant:
        return self._original

    def attempt(self, candidate: Candidate, stage: Stage = "tried") -> Trial:
        """Try a candidate. Raises `OutOfTime` where the budget is spent, unless it was tried before."""
        if (known := self._ledger.known(candidate, stage)) is not None:
            return known
        self._check_time()
        began = time.perf_counter()
        trial = Trial(candidate, stage, 0.0)
        try:
            with self.built(candidate, dry=stage == "dry") as built:
                trial = self._measured(trial, built) if stage == "dry" else self._judged(trial, built)
        except (UserError, MissingExtra) as error:
            trial = replace(trial, refused=error.message)
        trial = replace(trial, seconds=time.perf_counter() - began)
        self._material.note(said(trial))
        return self._ledger.add(trial)

    @contextmanager
    def built(self, candidate: Candidate, *, dry: bool = False) -> Generator[Built]:
        """A candidate made anew, from what was trained and kept where there is that."""
        loaded, history = load(self._artifact), list[Transform]()
        material = replace(self._material, note=_quiet)
        if dry:
            few = replace(material, train=material.sample(DRY_ROWS), validation=(), unlabelled=(), progress=_still)
            shape = () if candidate.shape is None else (_briefly(candidate.shape),)
            finish = tuple(Step(one.method, {**one.options, **BARE.get(one.method, {})}) for one in candidate.finish)
            loaded, _ = apply_chain(loaded, shape, few)
            loaded, _ = apply_chain(loaded, finish, replace(material, validation=(), progress=_still))
        else:
            if candidate.shape is not None:
                loaded, history = self._trained(candidate.shape)
            loaded, further = apply_chain(loaded, candidate.finish, material)
            history = [*history, *further]
        with opened(loaded, candidate.runtime) as contestant:
            yield Built(loaded, contestant, history)

    def compare(self, built: Mapping[str, Contestant], *, rounds: int) -> dict[str, Cost]:
        """Measure these and the model as it was, under `before`, in turns."""
        return measure({"before": self._original, **built}, self._measured_on, rounds=rounds)

    def _trained(self, shape: Step) -> tuple[Loaded, list[Transform]]:
        """The model after a step that takes long: trained now, or read again."""
        path = self._ledger.shape(spelled(shape))
        if not path.exists():
            shutil.rmtree(path.with_name(path.name + ".partial"), ignore_errors=True)
            self._material.note(f"training {spelled(shape)}")
            with create(path, discard_on_error=True) as writer:
                loaded, history = apply_chain(load(self._artifact), [shape], self._material)
                write(writer, loaded, self._artifact, self._rows, None, history)
        made = Artifact.open(path)
        return load(made), list(made.manifest.history[len(self._artifact.manifest.history) :])

    def _judged(self, trial: Trial, built: Built) -> Trial:
        engine, rows = built.contestant.engine, self._rows.validation
        after = self._scores(engine)
        proof = judge(self._before, after, where="the rows to choose on", allowed=self._config.max_drop)
        moved = batch_dependence(engine, [Request(row) for row in rows[:TOGETHER_ROWS]])
        trial = self._measured(replace(trial, proof=proof, batch_error=moved), built)
        if moved > MOST_BATCH_ERROR and trial.candidate.runtime not in self._config.goal.runtimes:
            what = f"a text's answer depends on those beside it (by {moved:.1%})"
            return replace(trial, refused=f"{what}: name the runtime to allow that")
        return trial

    def _measured(self, trial: Trial, built: Built) -> Trial:
        costs = self.compare({"after": built.contestant}, rounds=ROUNDS)
        first = self._ledger.known(AS_IT_IS, "tried")
        before = costs["before"] if first is None or first.reference is None else first.reference
        cost = costs["after"].beside(before, costs["before"])
        return replace(trial, cost=cost, reference=before, ran=dict(built.contestant.engine.record))

    def _scores(self, engine: Runtime) -> Float[np.ndarray, "row"]:
        scores, _ = scored(engine, self._rows.validation)
        if scores is None:
            hint = "compress it by steps that you choose, without --max-drop"
            raise UserError(f"the task '{engine.task.name}' has no score for a single row to search by", hint=hint)
        return scores

    def _short(self, rows: Sequence[Record]) -> Sequence[Record]:
        """So many rows that a round does not take long."""
        rows = rows[:TOGETHER]
        began = time.perf_counter()
        for _ in self._original.engine.run_stream(rows):
            pass
        fitting = len(rows) * ROUND_SECONDS / (time.perf_counter() - began)
        return rows[: max(TOGETHER_ROWS, int(fitting))]

    def _progress(self, share: float) -> None:
        self._check_time()
        self._told(share)

    def _check_time(self) -> None:
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise OutOfTime


def _quiet(line: str) -> None:
    return


def _still(share: float) -> None:
    return


def _briefly(step: Step) -> Step:
    """A step that makes a model of the same size, hardly trained."""
    options = dict(step.options)
    if step.method == "exits":
        return Step("exits", {**options, "epochs": 1})
    if step.method != "distil":
        options["recover"] = False
    recovery = {**options.get("recovery", {}), "epochs": 1}
    return Step(step.method, {**options, "recovery": recovery})


@contextmanager
def opened(loaded: Loaded, runtime: str) -> Generator[Contestant]:
    """A model in a runtime; what that needs is written into a folder that does not stay."""
    form = find_runtime(runtime).form
    if form is None:
        yield Contestant(open_engine(loaded, runtime), loaded_bytes(loaded))
        return
    with tempfile.TemporaryDirectory() as folder:
        writing = find_format(form)
        (file,) = writing.write(loaded, Path(folder), writing.Options())
        tokenizer = len(loaded.tokenizer.to_str().encode())
        size = sum(path.stat().st_size for path in Path(folder).glob(f"{file}*"))
        yield Contestant(open_engine(loaded, runtime, file=Path(folder) / file), size + tokenizer)


def said(trial: Trial) -> str:
    """A trial in one line."""
    name = f"{trial.candidate.name}{' (not trained)' if trial.stage == 'dry' else ''}"
    if trial.refused is not None:
        return f"{name}: no, {trial.refused}"
    assert trial.cost is not None
    cost = (
        f"{trial.cost.bytes / 1e6:.1f} MB, p50 {trial.cost.p50_ms:.2f} ms, {trial.cost.texts_per_second:,.0f} texts/s"
    )
    if trial.proof is None:
        return f"{name}: {cost}"
    low, high = trial.proof.interval
    return f"{name}: loses {trial.proof.drop:+.4f} ({low:+.4f} to {high:+.4f}), {cost}"
