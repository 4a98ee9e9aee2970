"""`manifest.json`: what an artefact is, where it came from, and the hash of every file in it."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from lexmill.errors import UserError

SCHEMA_VERSION = 1
FILE_NAME = "manifest.json"


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def lexmill_version() -> str:
    return version("lexmill")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TaskRecord(_Record):
    """A task by name, and what its `from_state` needs."""

    name: str
    state: dict[str, JsonValue] = Field(default_factory=dict)


class Metric(_Record):
    """A measured number and its 95 % confidence interval, where there is one. Never NaN: leave such a metric out."""

    value: float
    interval: tuple[float, float] | None = None


class Transform(_Record):
    """One step of an artefact's history.

    Args:
        name: the verb or method, e.g. `fit`, `prune`.
        parameters: what it was asked to do.
        effect: what it cost and gained, by name, e.g. `seconds`, `accuracy`, `bytes`.
        when: UTC, ISO 8601.
        version: of Lexmill.
    """

    name: str
    parameters: dict[str, JsonValue] = Field(default_factory=dict)
    effect: dict[str, float] = Field(default_factory=dict)
    when: str = Field(default_factory=now)
    version: str = Field(default_factory=lexmill_version)


class Environment(_Record):
    """What bit-identity depends on: versions, the CPU's instruction set as torch names it, and threads."""

    lexmill: str = Field(default_factory=lexmill_version)
    python: str = Field(default_factory=platform.python_version)
    platform: str = Field(default_factory=platform.platform)
    torch: str | None = None
    cpu_capability: str | None = None
    threads: int | None = None
    packages: dict[str, str] = Field(default_factory=dict)


class FileRecord(_Record):
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class Manifest(_Record):
    """Everything about an artefact that is not in a file of its own.

    Args:
        task: the task and its state (labels, columns).
        preprocessing: how text becomes tokens, beyond `tokenizer.json`.
        structure: what `config.json` cannot say: per-layer overrides, module kinds, token-id map, exits, adapters.
        data: the fingerprint of the data it was made from.
        metrics: by split (`test`, `validation`), then by name.
        history: transforms, oldest first.
        environment: of the last transform.
        runtime: what answers where nobody names another, e.g. `openvino`; torch where None.
        weights: per tensor name, the sha256 of the trained weights as they stood in memory. Independent of the file
            hashes, so that a weight changed on disk is caught even where `files` was made to match.
        files: per relative path, size and hash; filled in when the artefact is written.
    """

    schema_version: int = SCHEMA_VERSION
    task: TaskRecord
    preprocessing: dict[str, JsonValue] = Field(default_factory=dict)
    structure: dict[str, JsonValue] = Field(default_factory=dict)
    data: dict[str, JsonValue] = Field(default_factory=dict)
    metrics: dict[str, dict[str, Metric]] = Field(default_factory=dict)
    history: tuple[Transform, ...] = ()
    created: str = Field(default_factory=now)
    environment: Environment = Field(default_factory=Environment)
    runtime: str | None = None
    weights: dict[str, str] = Field(default_factory=dict)
    files: dict[str, FileRecord] = Field(default_factory=dict)

    def to_json(self) -> str:
        # A version that does not know the field reads every manifest that does not use it.
        return self.model_dump_json(indent=2, exclude={"runtime"} if self.runtime is None else None) + "\n"


def parse(text: bytes, file: Path) -> Manifest:
    """Read a manifest. Raises `UserError` for broken JSON, a wrong shape, or a schema newer than this version knows."""
    try:
        raw = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"not valid JSON: {error}", where=f"{file}{line}", hint="copy the artefact again") from error
    schema = raw.get("schema_version") if isinstance(raw, dict) else None
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise UserError("not a Lexmill manifest: it has no schema_version", where=str(file))
    if schema > SCHEMA_VERSION:
        raise UserError(
            f"written by a newer Lexmill: schema version {schema}, and this one reads up to {SCHEMA_VERSION}",
            where=str(file),
            hint="upgrade with: pip install -U lexmill",
        )
    try:
        return Manifest.model_validate_json(text, strict=True)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        raise UserError(f"'{key}' is wrong: {fault['msg']}", where=str(file), hint="copy the artefact again") from error
