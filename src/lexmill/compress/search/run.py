"""The search as a whole: what is asked, what is tried, what is chosen, how it is proved, and what is written."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lexmill.artifact import Artifact, Transform, create
from lexmill.compress.base import Material
from lexmill.compress.chain import CompressResult, following, summed_up, write
from lexmill.compress.config import CompressConfig
from lexmill.compress.measure import Cost
from lexmill.compress.proof import Proof, prove
from lexmill.compress.rows import Rows, find_rows
from lexmill.compress.search.explore import Explorer, ranked
from lexmill.compress.search.page import write_page
from lexmill.compress.search.space import check_names, finishes
from lexmill.compress.search.telling import Story, nearest, off, tell
from lexmill.compress.search.trial import Ledger, Trial, fingerprint
from lexmill.compress.search.workshop import Built, Workshop
from lexmill.compress.sensitivity import measure_sensitivity
from lexmill.engine import RUNTIMES, Loaded, available_runtimes, load
from lexmill.errors import Failure, MissingExtra, UserError
from lexmill.evaluate import Evaluation
from lexmill.export import export
from lexmill.fit import Watch
from lexmill.hardware import EnergyMeter

FINALISTS = 3
FINAL_ROUNDS = 7
SENSITIVITY_ROWS = 128
RECORD, PAGE, CHOSEN = "run/search.json", "run/search.html", "chosen"


def search(
    artifact: Artifact, original: Loaded, out: Path, config: CompressConfig, *, resume: bool, watch: Watch
) -> CompressResult:
    """Find the chain and the runtime that reach the goal, prove them and write them.

    Args:
        out: where the artefact goes. What is tried is kept in `config.search`, beside it in `OUT.search` where not
            given, to go on with.

    Raises:
        UserError: as `compress`; energy is bounded and cannot be measured; the model as it is reaches the goal.
        Failure: nothing reached the goal, or what did is not proved to; nothing is written.
    """
    began, goal = time.perf_counter(), config.goal
    assert config.max_drop is not None
    if goal.energy_mj is not None and EnergyMeter.find() is None:
        hint = "leave --energy out, and bound the time"
        raise UserError("this machine does not say how much energy it uses", where="goal.energy_mj", hint=hint)
    runtimes = _runtimes(original)
    check_names(goal, runtimes)
    rows = find_rows(artifact, config.data, config.seed, unseen=True)
    folder = config.search or out.with_name(out.name + ".search")
    ledger = Ledger(folder, fingerprint(artifact, rows, config), resume=resume)
    follow = following(watch)
    material = Material([load(artifact)], rows.train, rows.validation, rows.unlabelled, config.seed, watch.note, follow)
    deadline = None if goal.budget_minutes is None else time.monotonic() + 60 * goal.budget_minutes
    workshop = Workshop(artifact, original, rows, config, ledger, material, deadline)
    watch.note("how much every layer matters")
    subject = load(artifact)
    sensitivity = measure_sensitivity(subject, material.sample(SENSITIVITY_ROWS), follow)
    tried = goal.runtimes or [name for name in runtimes if not RUNTIMES[name].slow_to_open]
    explorer = Explorer(workshop, subject, [one for one in tried if one != "torch"], goal, config.max_drop)
    explorer.run(finishes(goal, sensitivity), sensitivity)
    found = explorer.meeting()
    if not found:
        raise Failure(
            nearest(list(explorer.trials.values()), explorer.left_out, config),
            where=str(ledger.folder),
            hint=_hint(explorer),
        )
    final = _final(workshop, explorer, config, watch)
    story = Story(config, explorer, sensitivity, final.trial, final.ranked, time.perf_counter() - began)
    with workshop.built(final.trial.candidate) as built:
        watch.note(f"proving {final.trial.candidate.name} on {len(rows.proof):,} rows: {rows.proof_from}")
        proof, evaluation = prove(
            workshop.original.engine,
            built.contestant.engine,
            rows.proof,
            where=rows.proof_from,
            allowed=config.max_drop,
        )
        assert proof is not None
        opened = ledger.proved(final.trial.candidate.name, proof)
        told = tell(story, opened)
        if not proof.holds:
            hint = "nothing was written: allow more, or give more rows with --test"
            said = [f"{final.trial.candidate.name} was chosen", *proof.lines()]
            if opened > 1:
                said.append(f"this search has asked these rows {opened} times by now")
            raise Failure("; ".join(said), where=str(out), hint=hint)
        work = _Finished(artifact, out, rows, built, final, proof, evaluation, told)
        made = work.written(ledger.folder, config, time.perf_counter() - began)
    costs = final.costs
    return CompressResult(made, proof, costs["before"], costs["after"], time.perf_counter() - began, told)


def _runtimes(original: Loaded) -> list[str]:
    """Those that are installed, with what writes their format."""
    from importlib.util import find_spec

    writes = all(find_spec(name) for name in ("onnx", "onnxscript"))
    return [name for name in available_runtimes() if writes or RUNTIMES[name].form is None]


def _hint(explorer: Explorer) -> str:
    if explorer.out_of_time:
        return "the budget was spent: go on with --resume"
    return "nothing was written: allow more, or ask for less; --resume uses what was trained again"


@dataclass(frozen=True)
class _Final:
    """The one chosen, and what it and the model as it was cost; all finalists, the best first."""

    trial: Trial
    costs: Mapping[str, Cost]
    ranked: Sequence[Trial]


def _final(workshop: Workshop, explorer: Explorer, config: CompressConfig, watch: Watch) -> _Final:
    """Measure the best together, once more and longer, and choose."""
    found = explorer.meeting()[:FINALISTS]
    watch.note(f"measuring the best {len(found)} together")
    with ExitStack() as stack:
        built = {one.candidate.name: stack.enter_context(workshop.built(one.candidate)) for one in found}
        costs = workshop.compare({name: one.contestant for name, one in built.items()}, rounds=FINAL_ROUNDS)
    again = [replace(one, cost=costs[one.candidate.name], reference=costs["before"]) for one in found]
    fitting = [one for one in again if explorer.meets(one)]
    if not fitting:
        near = again[0]
        what = f"{near.candidate.name} was within once, and is not when measured longer: {off(near, config.goal)}"
        raise Failure(what, hint="go on with --resume when nothing else runs, or ask for less")
    best = ranked(fitting, config.goal)
    chosen = best[0]
    return _Final(chosen, {"before": costs["before"], "after": costs[chosen.candidate.name]}, best)


@dataclass(frozen=True)
class _Finished:
    """What is to be written."""

    source: Artifact
    out: Path
    rows: Rows
    built: Built
    final: _Final
    proof: Proof
    evaluation: Evaluation
    told: Mapping[str, Any]

    def written(self, folder: Path, config: CompressConfig, seconds: float) -> Artifact:
        """The artefact; of another runtime than torch with what that runs."""
        candidate = self.final.trial.candidate
        parameters = {
            "max_drop": config.max_drop,
            "goal": config.goal.given,
            "rows": self.rows.proof_from,
            "tried": self.told["tried"],
            "runtime": candidate.runtime,
        }
        last = summed_up(candidate.chain, self.final.costs, self.proof, seconds=seconds, parameters=parameters)
        form = RUNTIMES[candidate.runtime].form
        if form is None:
            return self._write(self.out, [*self.built.history, last])
        chosen = folder / CHOSEN
        shutil.rmtree(chosen, ignore_errors=True)  # of an earlier goal
        made = self._write(chosen, [*self.built.history, last])
        return export(made.path, self.out, form, runtime=candidate.runtime).artifact

    def _write(self, out: Path, history: Sequence[Transform]) -> Artifact:
        with create(out, discard_on_error=True) as writer:
            write(writer, self.built.loaded, self.source, self.rows, self.evaluation, history)
            runtime = self.final.trial.candidate.runtime
            if RUNTIMES[runtime].form is None and runtime != "torch":
                assert writer.manifest is not None
                writer.manifest = writer.manifest.model_copy(update={"runtime": runtime})
            record = {**self.told, "proof": self.proof.to_dict()}
            writer.path(RECORD).write_text(json.dumps(record, indent=2) + "\n", "utf-8")
            try:
                write_page(writer.path(PAGE), record, f"The search for {out.name}")
            except MissingExtra:
                writer.path(PAGE).unlink(missing_ok=True)
        return Artifact.open(out)
