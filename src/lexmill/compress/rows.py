"""Which rows a compression learns from, which it chooses on, and which its proof is made on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from lexmill.artifact import Artifact
from lexmill.data import Source, data_fingerprint, open_source
from lexmill.errors import UserError
from lexmill.tasks import Record

_READING = ("encoding", "delimiter", "skip_bad", "max_line_bytes")
"""How `fit` was told to read a file; an artefact of an earlier version may lack some."""
HELD_OUT = 0.1
"""Share of the training rows that choices are made on where there is no file of validation rows."""


@dataclass(frozen=True)
class Files:
    """Labelled rows; what is not given is what the artefact was fitted with.

    Args:
        train: to train and calibrate on.
        validation: to choose on.
        test: for the proof; half of the validation rows where there are none. A search without validation rows chooses
            on half of these.
        unlabelled: rows without labels that distillation may learn from.
    """

    train: Path | None = None
    validation: Path | None = None
    test: Path | None = None
    unlabelled: Path | None = None


@dataclass(frozen=True)
class Rows:
    """The rows of one compression; no row of the proof is among the others.

    Args:
        proof_from: what the proof's rows are, in words.
        data: the fingerprint of each file.
    """

    train: Sequence[Record]
    validation: Sequence[Record]
    proof: Sequence[Record]
    unlabelled: Sequence[Record]
    proof_from: str
    data: Mapping[str, Any]


def find_rows(artifact: Artifact, files: Files, seed: int, *, unseen: bool = False) -> Rows:
    """Read the rows. Those to choose on are drawn by the seed where there is no file of them.

    Args:
        unseen: whether they must be rows that the model was not trained on: half of the test rows, where there is no
            file. The search compares models on them; training rows would flatter those that learnt them by heart.

    Raises:
        UserError: a file is missing, or is not the one that the artefact was fitted with, or there are no rows for a
            proof that the model was not trained on, or they are those that it was.
    """
    recorded = _recorded(artifact)
    sources: dict[str, Source] = {}
    for part in ("train", "validation", "test"):
        given = cast("Path | None", getattr(files, part))
        source = _given(given) if given is not None else _as_fitted(artifact, recorded, part)
        if source is not None:
            sources[part] = source
    if "train" not in sources:
        raise UserError("the artefact does not say what it was trained on", hint="name the rows with --data FILE")
    if files.unlabelled is not None:
        sources["unlabelled"] = _given(files.unlabelled)
    read = {part: [row.values for row in source] for part, source in sources.items()}
    data = {part: data_fingerprint(source, len(read[part])) for part, source in sources.items()}
    _refuse_known(data, sources, artifact)
    train, choose, proof, proof_from = _divided(read, sources, np.random.default_rng(seed), unseen)
    proof, proof_from = _unknown(proof, proof_from, (read["train"], choose))
    if not choose or not proof:
        raise UserError("too few rows: none are left to choose on or to prove on", hint="give more with --validation")
    return Rows(train, choose, proof, read.get("unlabelled", []), proof_from, data)


def _divided(
    read: Mapping[str, Sequence[Record]], sources: Mapping[str, Source], order: np.random.Generator, unseen: bool
) -> tuple[Sequence[Record], Sequence[Record], Sequence[Record], str]:
    """The rows to train on, to choose on and for the proof, and what these last are."""
    halved = "test" if unseen and "validation" not in read else "validation"
    if halved in read and (halved == "test" or "test" not in read):
        mixed = [read[halved][i] for i in order.permutation(len(read[halved]))]
        half = len(mixed) // 2
        proof_from = f"half of {sources[halved].path.name}, which nothing was chosen on"
        return read["train"], mixed[:half], mixed[half:], proof_from
    if "test" not in read:
        hint = "give --test FILE, or --validation FILE, of which half is kept for the proof"
        raise UserError("no rows for a proof: all that are known were trained on", hint=hint)
    train, proof_from = read["train"], f"{sources['test'].path.name}, opened once"
    if "validation" in read:
        return train, read["validation"], read["test"], proof_from
    chosen = set(order.permutation(len(train))[: round(HELD_OUT * len(train))].tolist())
    choose = [row for i, row in enumerate(train) if i in chosen]
    return [row for i, row in enumerate(train) if i not in chosen], choose, read["test"], proof_from


def _refuse_known(data: Mapping[str, Any], sources: Mapping[str, Source], artifact: Artifact) -> None:
    """Raise a `UserError` where the test rows are a file that the model, or a choice, has seen."""
    if "test" not in sources:
        return
    fitted = cast("Mapping[str, Mapping[str, Any]]", artifact.manifest.data)
    for part in ("train", "validation"):
        seen = {one[part]["sha256"] for one in (data, fitted) if part in one and "sha256" in one[part]}
        if data["test"]["sha256"] in seen:
            what = "trained on" if part == "train" else "chosen on"
            hint = "give rows with --test that the model has not seen"
            raise UserError(f"these rows were {what}: they prove nothing", where=str(sources["test"].path), hint=hint)


def _unknown(proof: Sequence[Record], said: str, others: Sequence[Sequence[Record]]) -> tuple[Sequence[Record], str]:
    """The rows of a proof that are not, value for value, among the others."""
    known = {_spelled(row) for rows in others for row in rows}
    left = [row for row in proof if _spelled(row) not in known]
    dropped = len(proof) - len(left)
    return left, f"{said}, without {dropped:,} that are among the others too" if dropped else said


def _spelled(row: Record) -> str:
    return json.dumps(row, sort_keys=True, default=str)


def _given(path: Path) -> Source:
    return open_source(path)


def _recorded(artifact: Artifact) -> Mapping[str, Any]:
    """How the last `fit` was told to read its data."""
    for step in reversed(artifact.manifest.history):
        if step.name == "fit":
            return cast("Mapping[str, Any]", step.parameters.get("data") or {})
    return {}


def _as_fitted(artifact: Artifact, recorded: Mapping[str, Any], part: str) -> Source | None:
    path = recorded.get(part)
    if not path:
        return None
    hint = f"name the rows with --{'data' if part == 'train' else part} FILE"
    if not Path(path).is_file():
        raise UserError("the file that the artefact was fitted with is gone", where=str(path), hint=hint)
    source = open_source(
        Path(path),
        **{how: recorded[how] for how in _READING if how in recorded},
    )
    known = cast("Mapping[str, Any]", artifact.manifest.data.get(part) or {})
    if known.get("sha256") != data_fingerprint(source)["sha256"]:
        raise UserError("has changed since the artefact was fitted with it", where=str(path), hint=hint)
    return source
