"""A chain of methods on a model, and the artefact that it becomes, with what it cost and gained."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from lexmill import models
from lexmill.artifact import Artifact, Manifest, TaskRecord, Transform, Writer, render_card
from lexmill.compress.base import Material, Step
from lexmill.compress.measure import Cost, loaded_bytes, table
from lexmill.compress.proof import Proof
from lexmill.compress.rows import Rows
from lexmill.engine import Loaded
from lexmill.engine.files import environment, write_model
from lexmill.evaluate import Evaluation, metrics_of
from lexmill.fit import Watch

NAME = "compress"
"""Of the last transform of a compressed artefact, which says what was allowed and what was found."""


@dataclass(frozen=True)
class CompressResult:
    """A finished compression; all of it stands in the artefact.

    Args:
        search: what a search tried and why it chose this, in words; nothing where the steps were given.
    """

    artifact: Artifact
    proof: Proof | None
    before: Cost
    after: Cost
    seconds: float
    search: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        found = {
            "artifact": str(self.artifact.path),
            "seconds": self.seconds,
            "steps": [{"method": one.name, **one.effect} for one in own_steps(self.artifact.manifest)],
            "proof": self.proof and self.proof.to_dict(),
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
        }
        return found if self.search is None else {**found, "search": self.search}

    def lines(self) -> list[str]:
        lines: list[str] = list(self.search["lines"]) if self.search is not None else []
        for step in own_steps(self.artifact.manifest):
            lines.append(f"{step.name}: " + ", ".join(f"{key} {value:.4g}" for key, value in step.effect.items()))
        lines += table(self.before, self.after)
        return [*lines, *(self.proof.lines() if self.proof else []), f"wrote {self.artifact.path}"]


def own_steps(manifest: Manifest) -> Sequence[Transform]:
    """The steps of the last compression."""
    end = max(index for index, one in enumerate(manifest.history) if one.name == NAME)
    steps = cast("list[Any]", manifest.history[end].parameters["steps"])
    return manifest.history[end - len(steps) : end]


def following(watch: Watch) -> Callable[[float], None]:
    """What `Material.progress` tells the share of a step that is done, to show it."""

    def follow(share: float) -> None:
        for sink in watch.sinks:
            sink.emit({"phase": "compress", "step": round(1000 * share), "steps": 1000})

    return follow


def apply_chain(subject: Loaded, chain: Sequence[Step], material: Material) -> tuple[Loaded, list[Transform]]:
    """The subject after all steps, and what each did, weights and bytes included."""
    history: list[Transform] = []
    for number, step in enumerate(chain, start=1):
        method, options = step.read(f"steps[{number - 1}]")
        if len(chain) > 1:
            material.note(f"step {number} of {len(chain)}: {method.name}")
        began, before = time.perf_counter(), loaded_bytes(subject)
        subject, effect = method.apply(subject, material, options)
        seconds = time.perf_counter() - began
        effect = {**effect, "seconds": seconds, "bytes_before": before, "bytes_after": loaded_bytes(subject)}
        numbers = {name: float(value) for name, value in effect.items()}
        history.append(Transform(name=method.name, parameters=dict(step.options), effect=numbers))
    return subject, history


def write(
    writer: Writer,
    subject: Loaded,
    source: Artifact,
    rows: Rows,
    evaluation: Evaluation | None,
    history: Sequence[Transform],
) -> None:
    """Put a compressed model into an artefact, with the whole history of its source and its own.

    Args:
        evaluation: on the rows of the proof; None where it has not been asked them.
    """
    write_model(writer, subject, source.path)
    writer.manifest = Manifest(
        task=TaskRecord(name=subject.task.name, state=subject.task.state()),
        structure=subject.model.structure(),
        data={**source.manifest.data, **{f"{NAME}.{part}": one for part, one in rows.data.items()}},
        metrics={} if evaluation is None else {"test": metrics_of(evaluation)},
        history=(*source.manifest.history, *history),
        environment=environment(),
        weights=models.weights_digest(subject.model),
    )
    writer.path("card.md").write_text(render_card(writer.manifest, writer.out.name), "utf-8")


def summed_up(
    chain: Sequence[Step],
    costs: Mapping[str, Cost],
    proof: Proof | None,
    *,
    seconds: float,
    parameters: Mapping[str, Any],
) -> Transform:
    """The transform that ends the history of a compression: all that was asked, cost and gained."""
    effect = {"seconds": seconds, **_compared(costs), **_proved(proof)}
    return Transform(name=NAME, parameters={"steps": [asdict(step) for step in chain], **parameters}, effect=effect)


def _compared(costs: Mapping[str, Cost]) -> dict[str, float]:
    return {f"{name}_{when}": value for when, cost in costs.items() for name, value in cost.to_dict().items()}


def _proved(proof: Proof | None) -> dict[str, float]:
    if proof is None:
        return {}
    low, high = proof.interval
    return {"drop": proof.drop, "drop_low": low, "drop_high": high, "rows": float(proof.rows)}
