"""A compression: of an artefact, by a chain that is given or searched for, into a new artefact."""

from __future__ import annotations

import time
from pathlib import Path

from lexmill.artifact import Artifact, create, refuse_existing
from lexmill.compress.base import Material, check_order
from lexmill.compress.chain import CompressResult, apply_chain, following, summed_up, write
from lexmill.compress.config import CompressConfig
from lexmill.compress.measure import Contestant, measure
from lexmill.compress.proof import prove
from lexmill.compress.rows import find_rows
from lexmill.compress.search import search
from lexmill.engine import Loaded, load
from lexmill.errors import Failure, UserError
from lexmill.fit import Watch
from lexmill.hardware import keep_heap


def compress(
    source: Path | str, out: Path | str, config: CompressConfig, *, resume: bool = False, watch: Watch | None = None
) -> CompressResult:
    """Make an artefact smaller or faster, by a chain of methods or by a search for one, and prove what that costs.

    Args:
        out: where the artefact goes; must not exist.
        resume: go on with a search that was interrupted, or whose goal was out of reach.

    Raises:
        UserError: for an illegal order, options that are wrong or would do nothing, rows that are missing or changed.
        Failure: the drop is not proved to be within `max_drop`, or nothing reached the goal; nothing is written.
    """
    out, artifact, watch = Path(out), Artifact.open(Path(source)), watch or Watch()
    config.check()
    refuse_existing(out, resume=False)
    keep_heap()
    original = load(artifact)
    if original.adapters:
        hint = "merge one: fit it without others, and compress that"
        raise UserError("an artefact with several adapters cannot be compressed", where=str(source), hint=hint)
    if config.steps:
        if resume:
            raise UserError("steps are given: there is nothing to go on with", where="--resume", hint="leave it out")
        return _run_chain(artifact, original, out, config, watch)
    return search(artifact, original, out, config, resume=resume, watch=watch)


def _run_chain(artifact: Artifact, original: Loaded, out: Path, config: CompressConfig, watch: Watch) -> CompressResult:
    began, chain = time.perf_counter(), config.chain()
    check_order(chain)
    subject = load(artifact)
    for index, step in enumerate(chain):
        method, options = step.read(f"steps[{index}]")
        try:
            method.check(subject, options)
        except UserError as fault:
            where = f"steps[{index}] ({step.method}){f': {fault.where}' if fault.where else ''}"
            raise UserError(fault.message, where=where, hint=fault.hint) from fault
    rows = find_rows(artifact, config.data, config.seed)
    material = Material(
        [original], rows.train, rows.validation, rows.unlabelled, config.seed, watch.note, following(watch)
    )
    with create(out, discard_on_error=True) as writer:
        subject, history = apply_chain(subject, chain, material)
        watch.note(f"proving on {len(rows.proof):,} rows: {rows.proof_from}")
        before, after = Contestant.of(original), Contestant.of(subject)
        proof, evaluation = prove(
            before.engine, after.engine, rows.proof, where=rows.proof_from, allowed=config.max_drop
        )
        if proof is not None and not proof.holds:
            hint = "nothing was written: compress less, or allow more"
            raise Failure("; ".join(proof.lines()), where=str(out), hint=hint)
        watch.note("measuring both in turns")
        costs = measure({"before": before, "after": after}, rows.proof)
        parameters = {"max_drop": config.max_drop, "rows": rows.proof_from}
        last = summed_up(chain, costs, proof, seconds=time.perf_counter() - began, parameters=parameters)
        write(writer, subject, artifact, rows, evaluation, [*history, last])
    return CompressResult(Artifact.open(out), proof, costs["before"], costs["after"], time.perf_counter() - began)
