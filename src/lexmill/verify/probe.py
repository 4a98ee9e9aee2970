"""`python -m lexmill.verify.probe ARTEFACT`: what a fresh process finds in an artefact, as JSON on standard output."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from lexmill import models
from lexmill.adapt import adapter_tensors
from lexmill.artifact import Artifact
from lexmill.engine import Loaded, load
from lexmill.engine.probes import evidence, stored_in
from lexmill.errors import UserError
from lexmill.export import Parity, exported


def observe(path: Path) -> dict[str, Any]:
    """The digests of the loaded weights, and what each set of stored probes gives, by name of its adapter."""
    loaded = load(path)
    # With adapters in it a trunk has tensors of theirs; its own are then read once more.
    base = models.load(path) if loaded.adapters else loaded.model
    adapters = adapter_tensors({name: one.model for name, one in loaded.adapters.items()})
    return {
        "weights": models.weights_digest(base) | models.digest(adapters),
        "task": loaded.task.name,
        "evidence_field": loaded.task.evidence_field,
        "exported": {
            file: {"said": str(found), "ok": isinstance(found, Parity) and found.holds, **_numbers(found)}
            for file, found in exported(Artifact.open(path, check=False), loaded)
        },
        "probes": {
            name or "": _probed(loaded.of(name), json.loads(file.read_text(encoding="utf-8")))
            for name, file in stored_in(path, loaded.adapters).items()
        },
    }


def _numbers(found: Parity | UserError) -> dict[str, float]:
    """What may be told as JSON, which has no infinity."""
    return found.to_dict() if isinstance(found, Parity) and math.isfinite(found.max_error) else {}


def _probed(loaded: Loaded, stored: dict[str, Any]) -> dict[str, Any]:
    """The evidence for the stored probes, and the records that the loaded task makes of the stored request."""
    request = loaded.task.Request.model_validate(stored["request"])
    return {
        "evidence": evidence(loaded, [probe["record"] for probe in stored["probes"]]),
        "records": [dict(record) for record in loaded.task.items(request)],
    }


if __name__ == "__main__":
    json.dump(observe(Path(sys.argv[1])), sys.stdout)
