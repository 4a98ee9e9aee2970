"""What is known of a candidate that was tried, and the folder that keeps it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lexmill.artifact import Artifact
from lexmill.compress.config import CompressConfig, Goal
from lexmill.compress.measure import Cost
from lexmill.compress.proof import Proof
from lexmill.compress.rows import Rows
from lexmill.compress.search.space import Candidate
from lexmill.engine.files import environment
from lexmill.errors import UserError
from lexmill.fit.record import write_whole

Stage = Literal["tried", "dry"]
ASKED, TRIALS, PROOFS, SHAPES = "asked.json", "trials.jsonl", "proofs.jsonl", "shapes"


@dataclass(frozen=True)
class Trial:
    """One candidate, tried.

    Args:
        stage: `dry` where it was not trained, only measured: what it says means nothing, what it costs does.
        proof: the drop on the rows to choose on; None for a dry one.
        cost: as it would have been beside the first trial (`Cost.beside`); None where it was refused.
        reference: of the model as it was, in the first trial.
        refused: why it is none that could be chosen.
        ran: what computed it, such as the precision of its products; see `Runtime.record`.
        batch_error: how far a text's numbers alone are from those among others, as max|a−b| / max|b|.
    """

    candidate: Candidate
    stage: Stage
    seconds: float
    proof: Proof | None = None
    cost: Cost | None = None
    reference: Cost | None = None
    refused: str | None = None
    batch_error: float = 0.0
    ran: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def holds(self) -> bool:
        """Whether it could be chosen as far as its answers go."""
        return self.refused is None and self.proof is not None and self.proof.holds

    def to_dict(self) -> dict[str, Any]:
        proof = self.proof and {k: v for k, v in self.proof.to_dict().items() if k != "holds"}
        return {
            "name": self.candidate.name,
            "candidate": self.candidate.to_dict(),
            "stage": self.stage,
            "seconds": self.seconds,
            "proof": proof,
            "cost": self.cost and self.cost.to_dict(),
            "reference": self.reference and self.reference.to_dict(),
            "refused": self.refused,
            "batch_error": self.batch_error,
            "ran": dict(self.ran),
        }

    @classmethod
    def from_dict(cls, stated: Mapping[str, Any]) -> Trial:
        proof, cost, reference = stated["proof"], stated["cost"], stated["reference"]
        return cls(
            Candidate.from_dict(stated["candidate"]),
            stated["stage"],
            stated["seconds"],
            proof and _proof(proof),
            cost and Cost.from_dict(cost),
            reference and Cost.from_dict(reference),
            stated["refused"],
            stated["batch_error"],
            stated["ran"],
        )


def _proof(stated: Mapping[str, Any]) -> Proof:
    low, high = stated["interval"]
    drop, rows, where = stated["drop"], stated["rows"], stated["where"]
    return Proof(drop, (low, high), rows, where, stated["allowed"], stated["rows_needed"])


def missed(cost: Cost, goal: Goal) -> dict[str, float]:
    """By bound of the goal that a cost does not keep, how many times it is too large."""
    found: dict[str, float] = {}
    for name, most, value in (
        ("p50_ms", goal.p50_ms, cost.p50_ms),
        ("p99_ms", goal.p99_ms, cost.p99_ms),
        ("size_mb", goal.size_mb, cost.bytes / 1e6),
        ("energy_mj", goal.energy_mj, cost.energy_mj),
    ):
        if most is not None and value is not None and value > most:
            found[name] = value / most
    if goal.texts_per_second is not None and cost.texts_per_second < goal.texts_per_second:
        found["texts_per_second"] = goal.texts_per_second / cost.texts_per_second
    return found


def front(trials: Iterable[Trial]) -> list[Trial]:
    """Those tried that no other beats in all of: score lost, size, latency of one text, time of a stream. They come in
    the order of what they lose."""
    known = {one.candidate.name: one for one in trials if one.stage == "tried" and one.refused is None}
    marks = {name: _marks(one) for name, one in known.items()}
    best = [
        name
        for name, own in marks.items()
        if not any(other != own and all(a <= b for a, b in zip(other, own, strict=True)) for other in marks.values())
    ]
    return sorted((known[name] for name in best), key=_marks)


def _marks(trial: Trial) -> tuple[float, ...]:
    assert trial.proof is not None
    assert trial.cost is not None
    cost = trial.cost
    return trial.proof.drop, cost.bytes, cost.p50_ms, 1 / cost.texts_per_second


class Ledger:
    """The folder of a search: what was asked, every trial as a line, and the shapes that were trained.

    Args:
        folder: where; made where it is not there.
        resume: whether an earlier search's may be there. What does not depend on the goal is used again.

    Raises:
        UserError: it is there and is not to be resumed, or the other way round, or it was of another model, other rows
            or other epochs.
    """

    def __init__(self, folder: Path, asked: Mapping[str, Any], *, resume: bool) -> None:
        self.folder = folder
        file = folder / ASKED
        if folder.exists() and not resume:
            hint = "give --resume to go on with it, or delete it"
            raise UserError("there is a search already", where=str(folder), hint=hint)
        if resume and not file.is_file():
            hint = "leave out --resume, or name its folder with --search"
            raise UserError("there is no search to go on with", where=str(folder), hint=hint)
        if file.is_file():
            earlier = _asked(file)
            if changed := sorted(key for key in asked if asked[key] != earlier.get(key)):
                what = f"the search was of another {' and '.join(changed)}"
                raise UserError(what, where=str(folder), hint="leave out --resume, and give another --out or --search")
        (folder / SHAPES).mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(asked, indent=2) + "\n")
        self._known = {(one.candidate.name, one.stage): one for one in _read(folder / TRIALS)}

    @property
    def trials(self) -> Sequence[Trial]:
        return list(self._known.values())

    def known(self, candidate: Candidate, stage: Stage) -> Trial | None:
        return self._known.get((candidate.name, stage))

    def add(self, trial: Trial) -> Trial:
        """Write it down, at once."""
        self._known[trial.candidate.name, trial.stage] = trial
        _append(self.folder / TRIALS, trial.to_dict())
        return trial

    def proved(self, name: str, proof: Proof) -> int:
        """Note that the rows of the proof were asked. How often that is by now."""
        _append(self.folder / PROOFS, {"name": name, **proof.to_dict()})
        return len((self.folder / PROOFS).read_text("utf-8").splitlines())

    def shape(self, name: str) -> Path:
        """Where the artefact of a trained step is kept."""
        return self.folder / SHAPES / "".join(c if c.isalnum() else "-" for c in name)


def _asked(file: Path) -> Mapping[str, Any]:
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError as error:
        hint = "delete the folder to search anew"
        raise UserError(f"does not say what was searched: {error}", where=str(file), hint=hint) from error


def _append(file: Path, entry: Mapping[str, Any]) -> None:
    """Add a line; one that was cut off before it is ended first."""
    with file.open("a+b") as lines:
        lines.seek(max(lines.seek(0, os.SEEK_END) - 1, 0))
        whole = lines.read() in (b"", b"\n")
        lines.write(("" if whole else "\n").encode() + json.dumps(entry).encode() + b"\n")


def _read(file: Path) -> list[Trial]:
    """The trials in a file; what cannot be read, such as a last line that was cut off, is left out and tried again."""
    found: list[Trial] = []
    for line in file.read_text("utf-8").splitlines() if file.is_file() else ():
        try:
            found.append(Trial.from_dict(json.loads(line)))
        except (ValueError, KeyError):  # KeyError: of an earlier version
            continue
    return found


def fingerprint(artifact: Artifact, rows: Rows, config: CompressConfig) -> dict[str, Any]:
    """What a search cannot go on with where it is another one."""
    return {
        "model": hashlib.sha256(json.dumps(artifact.manifest.weights, sort_keys=True).encode()).hexdigest(),
        "machine": environment().model_dump(),
        "rows": {part: one["sha256"] for part, one in rows.data.items()},
        "max_drop": config.max_drop,
        "epochs": config.goal.epochs,
        "seed": config.seed,
    }
