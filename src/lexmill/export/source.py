"""What is exported: an artefact, or a plain Hugging Face directory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lexmill.artifact import Artifact, is_huggingface
from lexmill.engine import Loaded, load, load_pretrained, probes
from lexmill.errors import UserError
from lexmill.tasks import Record


@dataclass(frozen=True)
class Source:
    """A model to export, and the answers it must keep.

    Args:
        artifact: None where it is a plain Hugging Face directory.
        stored: what `probes.record` gave of it.
    """

    path: Path
    loaded: Loaded
    artifact: Artifact | None
    stored: Mapping[str, Any]

    @property
    def records(self) -> list[Record]:
        return [probe["record"] for probe in self.stored["probes"]]

    @property
    def evidence(self) -> list[dict[str, float]]:
        return [probe["evidence"] for probe in self.stored["probes"]]


def open_source(path: Path) -> Source:
    """What stands at a path, its hashes checked.

    A plain Hugging Face directory is taken for what its head does; see `load_pretrained`.

    Raises:
        UserError: there is neither, or it cannot be exported as a whole.
    """
    if is_huggingface(path):
        loaded = load_pretrained(path)
        return Source(path, loaded, None, probes.record(loaded.task, loaded.model, loaded.tokenizer))
    artifact = Artifact.open(path)
    loaded = load(artifact)
    if loaded.adapters:
        hint = "fit it again with this adapter alone, and export that"
        raise UserError("an artefact with several adapters cannot be exported", where=str(path), hint=hint)
    return Source(path, loaded, artifact, json.loads(artifact.file(probes.FILE).read_text("utf-8")))
