"""Which settings are best, by training with many of them: Optuna's sampler and pruner over `fit`."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lexmill.config import load, to_dict
from lexmill.data import Source, open_source
from lexmill.data.fingerprint import data_fingerprint
from lexmill.engine import TorchEngine
from lexmill.errors import Failure, MissingExtra, Spoken, UserError
from lexmill.evaluate import evaluate
from lexmill.fit import DataConfig, FitConfig, Watch, fit
from lexmill.fit.record import write_whole
from lexmill.learn.space import Range, Space
from lexmill.monitor import Event
from lexmill.tasks import find

if TYPE_CHECKING:
    import optuna

STUDY, ASKED, RECORD, TRIALS, BEST = "study.log", "asked.json", "search.json", "trials", "best"
_UNPRUNED = 5
"""Trials that run to their end before any is stopped early."""


@dataclass(frozen=True)
class Asked:
    """What a search varies and what it does not.

    Args:
        settings: what every run has in common, by dotted key.
        space: what is chosen, by dotted key.
        recipe: a TOML file under both.
    """

    settings: Mapping[str, Any]
    space: Space
    recipe: Path | None = None

    def config(self, chosen: Mapping[str, Any]) -> FitConfig:
        """The config of one run. The test rows are left out: they are for the best run alone."""
        for key in chosen:
            if key in self.settings:
                raise UserError(f"'{key}' is set and searched", where="--try", hint="leave one of the two out")
        config = load(FitConfig, file=self.recipe, sets={**self.settings, **chosen}).value
        return replace(config, data=replace(config.data, test=None))


@dataclass(frozen=True)
class SearchResult:
    """A finished search; the folder holds it as `search.json`, and the best run's artefact.

    Args:
        metric: what was compared, on validation rows.
        best: the settings of the best run.
        value: its metric.
        test: its metrics on the test rows, where there are some.
        trials: by trial its number, state (`complete`, `pruned`, `fail`), value, settings and seconds.
    """

    artifact: Path
    metric: str
    best: dict[str, Any]
    value: float
    test: dict[str, float] | None
    trials: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "artifact": str(self.artifact)}

    def lines(self) -> list[str]:
        counts = {state: sum(t["state"] == state for t in self.trials) for state in ("complete", "pruned", "fail")}
        ended = f"{counts['complete']} ran to the end, {counts['pruned']} were stopped early, {counts['fail']} failed"
        chosen = " ".join(f"--set {key}={json.dumps(value)}" for key, value in self.best.items())
        tested = [f"test {name}: {value:.4f}" for name, value in (self.test or {}).items()]
        first = f"{len(self.trials)} trials: {ended}"
        return [first, f"best {self.metric} {self.value:.4f}: {chosen}", *tested, f"wrote {self.artifact}"]


def search(
    asked: Asked,
    out: Path,
    *,
    trials: int,
    jobs: int = 1,
    seed: int = 0,
    resume: bool = False,
    watch: Watch | None = None,
) -> SearchResult:
    """Train with settings that Optuna chooses, keep the best run's artefact, and test that one.

    Args:
        out: the search's folder; holds the study, so that an interrupted search goes on with `resume`.
        trials: how many settings are tried, those of an interrupted search included.
        jobs: processes at a time; each takes its share of the cores.
        seed: of the sampler. Of several processes the one that ends first shapes what the others try next.

    Raises:
        UserError: a wrong config, no validation rows, or `out` that exists (or does not, with `resume`).
        Failure: where no trial ran to its end.
    """
    watch = watch or Watch()
    first = asked.config(_corner(asked.space))
    task = find(first.task)
    if first.data.validation is None and not first.data.validation_fraction:
        hint = "give --validation FILE or --set data.validation_fraction=0.1"
        raise UserError("a search needs validation rows to compare runs by", where="data", hint=hint)
    if resume != (out / STUDY).is_file():
        found = "there is no search to go on with" if resume else "already exists"
        raise UserError(
            found, where=str(out), hint="leave out --resume" if resume else "give --resume, or another --out"
        )
    _same_search(out, asked, first)
    study = _study(out, task.metric_sign, seed, jobs)
    left = trials - _settle(study, out)
    shares = [left // jobs + (job < left % jobs) for job in range(jobs)]
    watch.note(f"{max(left, 0)} trials to go, {jobs} at a time")
    if jobs == 1:
        _work(asked, out, max(left, 0), seed, 1, 0, watch)
    else:
        _spread(asked, out, [share for share in shares if share > 0], seed, jobs)
    return _finish(asked, out, study, task.metric)


def _same_search(out: Path, asked: Asked, first: FitConfig) -> None:
    """Write down what is searched, of which rows; where that is there already, refuse another."""
    sources = {"train": first.data.train, "validation": first.data.validation}
    data = {name: data_fingerprint(_open(path, first.data)) for name, path in sources.items() if path is not None}
    space = {key: asdict(values) if isinstance(values, Range) else list(values) for key, values in asked.space.items()}
    left_out = {*space, "data.train", "data.validation"}
    settings = {key: value for key, value in _flat(to_dict(first)).items() if key not in left_out}
    file = out / ASKED
    now = json.loads(json.dumps({"space": space, "settings": settings, "data": data}, default=str))
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(now, indent=2, ensure_ascii=False) + "\n")
        return
    before = json.loads(file.read_text("utf-8"))
    for part in ("space", "settings", "data"):
        for key in sorted(before[part].keys() | now[part].keys()):
            was, given = before[part].get(key), now[part].get(key)
            if was != given:
                told = (
                    f"{key} has changed" if part == "data" else f"{key} was {json.dumps(was)}, is {json.dumps(given)}"
                )
                hint = "resume with what it began with, or search into another --out"
                raise UserError(f"the search had other {part}: {told}", where=str(file), hint=hint)


def _flat(config: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """By dotted key."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return found


def _corner(space: Space) -> dict[str, Any]:
    """Some setting of the space, to check the config with."""
    return {key: values.low if isinstance(values, Range) else values[0] for key, values in space.items()}


def _study(out: Path, sign: int, seed: int, jobs: int) -> optuna.Study:
    try:
        import optuna
    except ImportError as error:
        raise MissingExtra("search", "a search") from error
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(out / STUDY))),
        study_name="search",
        direction="maximize" if sign > 0 else "minimize",
        sampler=optuna.samplers.TPESampler(seed=seed, constant_liar=jobs > 1),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=_UNPRUNED),
        load_if_exists=True,
    )


def _settle(study: optuna.Study, out: Path) -> int:
    """How many trials are over. Those that an interrupted search left running are tried again."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params, skip_if_exists=True)
        _forget(out / TRIALS / str(trial.number))
    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED)))


def _forget(run: Path) -> None:
    shutil.rmtree(run, ignore_errors=True)
    shutil.rmtree(run.with_name(run.name + ".partial"), ignore_errors=True)


@dataclass
class _Judge:
    """Takes a run's validations to Optuna, and ends a run that is worse than others were by then."""

    trial: optuna.Trial
    metric: str
    sign: int
    best: float | None = None

    def emit(self, event: Event) -> None:
        if event.get("phase") != "validate":
            return
        value, epoch = event[self.metric], event["epoch"]
        assert isinstance(value, (int, float))
        assert isinstance(epoch, int)
        if self.best is None or (value - self.best) * self.sign > 0:
            self.best = float(value)
        self.trial.report(self.best, epoch)
        if self.trial.should_prune():
            from optuna import TrialPruned

            raise TrialPruned

    def close(self) -> None:
        pass


def _work(asked: Asked, out: Path, trials: int, seed: int, jobs: int, job: int, watch: Watch) -> None:
    """Run this many trials, in this process."""
    import torch

    task = find(asked.config(_corner(asked.space)).task)
    study = _study(out, task.metric_sign, seed + job, jobs)
    if jobs > 1:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // jobs))

    def run(trial: optuna.Trial) -> float:
        chosen = {key: _choose(trial, key, values) for key, values in asked.space.items()}
        place = out / TRIALS / str(trial.number)
        judge = _Judge(trial, task.metric, task.metric_sign)
        shown = ", ".join(
            f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in chosen.items()
        )
        watch.note(f"trial {trial.number}: {shown}")
        try:
            fit(asked.config(chosen), place, watch=Watch(sinks=[*watch.sinks, judge]))
        except BaseException:
            _forget(place)
            raise
        assert judge.best is not None
        return judge.best

    def keep_the_best(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        said = "failed" if trial.value is None and trial.state.name == "FAIL" else trial.state.name.lower()
        watch.note(
            f"trial {trial.number}: {said}" + ("" if trial.value is None else f", {task.metric} {trial.value:.4f}")
        )
        if trial.state.name == "COMPLETE" and study.best_trial.number != trial.number:
            _forget(out / TRIALS / str(trial.number))

    study.optimize(run, n_trials=trials, catch=(Failure,), callbacks=[keep_the_best])


def _choose(trial: optuna.Trial, key: str, values: Range | Sequence[Any]) -> Any:
    if not isinstance(values, Range):
        return trial.suggest_categorical(key, list(values))
    if values.whole:
        return trial.suggest_int(key, int(values.low), int(values.high), log=values.log)
    return trial.suggest_float(key, values.low, values.high, log=values.log)


def _spread(asked: Asked, out: Path, shares: Sequence[int], seed: int, jobs: int) -> None:
    """Run trials in processes of their own. The first one's mistake is raised here; the others are then ended."""
    context = multiprocessing.get_context("spawn")
    errors: Any = context.SimpleQueue()
    workers = [
        context.Process(target=_worker, args=(asked, out, share, seed, jobs, job, errors), daemon=True)
        for job, share in enumerate(shares)
    ]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join()
            if worker.exitcode:
                said = errors.get() if not errors.empty() else f"a worker ended with {worker.exitcode}"
                raise said if isinstance(said, Spoken) else Failure(str(said), where=str(out), hint="--resume goes on")
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
                worker.join()


def _worker(asked: Asked, out: Path, share: int, seed: int, jobs: int, job: int, errors: Any) -> None:
    try:
        _work(asked, out, share, seed, jobs, job, Watch())
    except UserError as error:
        errors.put(UserError(error.message, where=error.where, hint=error.hint))
        raise SystemExit(2) from error
    except Exception:
        errors.put(traceback.format_exc())
        raise


def _finish(asked: Asked, out: Path, study: optuna.Study, metric: str) -> SearchResult:
    """Keep the best run alone, test it, and write the record."""
    done = [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]
    if all(trial.value is None or trial.state.name != "COMPLETE" for trial in done):
        raise Failure("no trial ran to its end", where=str(out), hint="see the notes above; widen the space")
    best = study.best_trial
    artifact = out / BEST
    if (out / TRIALS / str(best.number)).is_dir():
        _forget(artifact)
        (out / TRIALS / str(best.number)).rename(artifact)
    shutil.rmtree(out / TRIALS, ignore_errors=True)
    found = _tested(artifact, load(FitConfig, file=asked.recipe, sets={**asked.settings, **best.params}).value.data)
    trials = [
        {
            "number": trial.number,
            "state": trial.state.name.lower(),
            "value": trial.value,
            "settings": trial.params,
            "seconds": trial.duration.total_seconds() if trial.duration else None,
        }
        for trial in done
    ]
    result = SearchResult(artifact, metric, dict(best.params), float(best.value or 0.0), found, trials)
    (out / RECORD).write_text(json.dumps(result.to_dict(), indent=2, ensure_ascii=False) + "\n", "utf-8")
    return result


def _tested(artifact: Path, data: DataConfig) -> dict[str, float] | None:
    if data.test is None:
        return None
    return evaluate(TorchEngine(artifact), (row.values for row in _open(data.test, data))).metrics.values


def _open(file: Path, data: DataConfig) -> Source:
    return open_source(file, encoding=data.encoding, delimiter=data.delimiter, skip_bad=data.skip_bad)
