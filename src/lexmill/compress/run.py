"""A chain of methods on an artefact, what it cost and gained, and the proof; written as a new artefact."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Lt

from lexmill import models
from lexmill.artifact import Artifact, Manifest, TaskRecord, Transform, create, refuse_existing, render_card
from lexmill.compress.base import Material, Method, Step, check_order
from lexmill.compress.measure import Cost, loaded_bytes, measure, table
from lexmill.compress.proof import Proof, prove
from lexmill.compress.rows import Files, find_rows
from lexmill.engine import Loaded, TorchEngine, load
from lexmill.engine.files import environment, write_model
from lexmill.errors import Failure, UserError
from lexmill.evaluate import metrics_of
from lexmill.fit import Watch
from lexmill.hardware import keep_heap

NAME = "compress"
"""Of the last transform of a compressed artefact, which says what was allowed and what was found."""


@dataclass(frozen=True)
class CompressConfig:
    """One compression.

    Args:
        steps: one table a method: `method`, and its options.
        max_drop: the largest drop of the mean score a row that may be lost; nothing is written where the paired 95 %
            interval goes beyond it.
        data: see `Files`.
        seed: fixes which rows are held out, and all that methods draw.
    """

    steps: tuple[dict[str, Any], ...] = ()
    max_drop: Annotated[float, Ge(0), Lt(1)] | None = None
    data: Files = field(default_factory=Files)
    seed: Annotated[int, Ge(0), Lt(2**32)] = 0

    def chain(self) -> list[Step]:
        """The steps. A `UserError` for one without a method, or none at all."""
        if not self.steps:
            raise UserError("nothing to do", where="steps", hint="name a method, e.g. --step int8")
        for index, step in enumerate(self.steps):
            if not isinstance(step.get("method"), str):
                raise UserError("names no method", where=f"steps[{index}]", hint="give it method = 'int8', for example")
        return [Step(step["method"], {k: v for k, v in step.items() if k != "method"}) for step in self.steps]


@dataclass(frozen=True)
class CompressResult:
    """A finished compression; all of it stands in the artefact."""

    artifact: Artifact
    proof: Proof | None
    before: Cost
    after: Cost
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "artifact": str(self.artifact.path),
            "seconds": self.seconds,
            "steps": [{"method": one.name, **one.effect} for one in _own(self.artifact.manifest)],
            "proof": self.proof and self.proof.to_dict(),
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
        }

    def lines(self) -> list[str]:
        lines: list[str] = []
        for step in _own(self.artifact.manifest):
            lines.append(f"{step.name}: " + ", ".join(f"{key} {value:.4g}" for key, value in step.effect.items()))
        lines += table(self.before, self.after)
        return [*lines, *(self.proof.lines() if self.proof else []), f"wrote {self.artifact.path}"]


def _own(manifest: Manifest) -> Sequence[Transform]:
    """The steps of the last compression."""
    last = manifest.history[-1]
    return manifest.history[-1 - len(last.parameters["steps"]) : -1]  # pyright: ignore[reportArgumentType]


def compress(
    source: Path | str, out: Path | str, config: CompressConfig, *, watch: Watch | None = None
) -> CompressResult:
    """Make an artefact smaller or faster by a chain of methods, and prove what that costs.

    Args:
        out: where the artefact goes; must not exist.

    Raises:
        UserError: for an illegal order, options that are wrong or would do nothing, rows that are missing or changed.
        Failure: the drop is not proved to be within `max_drop`; nothing is written.
    """
    began, watch = time.perf_counter(), watch or Watch()
    out, artifact = Path(out), Artifact.open(Path(source))
    refuse_existing(out, resume=False)
    keep_heap()
    chain = config.chain()
    check_order(chain)
    steps = [step.read(f"steps[{index}]") for index, step in enumerate(chain)]
    subject, original = load(artifact), load(artifact)
    if subject.adapters:
        hint = "merge one: fit it without others, and compress that"
        raise UserError("an artefact with several adapters cannot be compressed", where=str(source), hint=hint)
    for method, options in steps:
        method.check(subject, options)
    rows = find_rows(artifact, config.data, config.seed)
    material = Material([original], rows.train, rows.validation, rows.unlabelled, config.seed, watch.note)
    with create(out, discard_on_error=True) as writer:
        subject, history = _apply(subject, steps, chain, material)
        watch.note(f"proving on {len(rows.proof):,} rows: {rows.proof_from}")
        proof, evaluation = prove(
            TorchEngine(original), TorchEngine(subject), rows.proof, where=rows.proof_from, allowed=config.max_drop
        )
        if proof is not None and not proof.holds:
            hint = "nothing was written: compress less, or allow more"
            raise Failure("; ".join(proof.lines()), where=str(out), hint=hint)
        watch.note("measuring both in turns")
        costs = measure({"before": original, "after": subject}, rows.proof)
        write_model(writer, subject, artifact.path)
        parameters: dict[str, Any] = {
            "steps": [asdict(step) for step in chain],
            "max_drop": config.max_drop,
            "rows": rows.proof_from,
        }
        effect = {"seconds": time.perf_counter() - began, **_compared(costs), **_proved(proof)}
        writer.manifest = Manifest(
            task=TaskRecord(name=subject.task.name, state=subject.task.state()),
            structure=subject.model.structure(),
            data={**artifact.manifest.data, **{f"{NAME}.{part}": one for part, one in rows.data.items()}},
            metrics={"test": metrics_of(evaluation)},
            history=(*artifact.manifest.history, *history, Transform(name=NAME, parameters=parameters, effect=effect)),
            environment=environment(),
            weights=models.weights_digest(subject.model),
        )
        writer.path("card.md").write_text(render_card(writer.manifest, out.name), "utf-8")
    return CompressResult(Artifact.open(out), proof, costs["before"], costs["after"], time.perf_counter() - began)


def _apply(
    subject: Loaded, steps: Sequence[tuple[Method, Any]], chain: Sequence[Step], material: Material
) -> tuple[Loaded, list[Transform]]:
    """The subject after all steps, and what each did, weights and bytes included."""
    history: list[Transform] = []
    for number, ((method, options), step) in enumerate(zip(steps, chain, strict=True), start=1):
        material.note(f"step {number} of {len(steps)}: {method.name}")
        began, before = time.perf_counter(), loaded_bytes(subject)
        subject, effect = method.apply(subject, material, options)
        seconds = time.perf_counter() - began
        effect = {**effect, "seconds": seconds, "bytes_before": before, "bytes_after": loaded_bytes(subject)}
        numbers = {name: float(value) for name, value in effect.items()}
        history.append(Transform(name=method.name, parameters=dict(step.options), effect=numbers))
    return subject, history


def _compared(costs: Mapping[str, Cost]) -> dict[str, float]:
    return {f"{name}_{when}": value for when, cost in costs.items() for name, value in cost.to_dict().items()}


def _proved(proof: Proof | None) -> dict[str, float]:
    if proof is None:
        return {}
    low, high = proof.interval
    return {"drop": proof.drop, "drop_low": low, "drop_high": high, "rows": float(proof.rows)}
