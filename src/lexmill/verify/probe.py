"""`python -m lexmill.verify.probe ARTEFACT`: what a fresh process finds in an artefact, as JSON on standard output."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from lexmill import models
from lexmill.engine import load
from lexmill.evaluate.probes import FILE, evidence


def observe(path: Path) -> dict[str, Any]:
    """The digests of the loaded weights, the evidence for the stored probes, and the records that the loaded task
    makes of the stored request."""
    loaded = load(path)
    stored = json.loads((path / FILE).read_text(encoding="utf-8"))
    request = loaded.task.Request.model_validate(stored["request"])
    return {
        "weights": models.weights_digest(loaded.model),
        "evidence": evidence(loaded, [probe["record"] for probe in stored["probes"]]),
        "task": loaded.task.name,
        "records": [dict(record) for record in loaded.task.items(request)],
        "evidence_field": loaded.task.evidence_field,
    }


if __name__ == "__main__":
    json.dump(observe(Path(sys.argv[1])), sys.stdout)
