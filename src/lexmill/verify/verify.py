"""Whether an artefact, loaded anew and asked over HTTP, still gives the answers of the model that was trained."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlencode

from lexmill.artifact import Artifact, Manifest
from lexmill.compress.chain import NAME as COMPRESS
from lexmill.engine import runtime_of
from lexmill.engine.loaded import read_task
from lexmill.engine.probes import FORMAT, stored_in
from lexmill.errors import UserError
from lexmill.export.parity import CODED, measure
from lexmill.nn.int8 import Int8Linear
from lexmill.verify.compare import TOLERANCE, Check, compare
from lexmill.verify.processes import ProcessFailed, ask, reload, served

TIMEOUT = 300.0


@dataclass(frozen=True)
class Verification:
    """What `verify` found, check by check. It ends with the step at which it fails."""

    artifact: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def lines(self) -> list[str]:
        """For people: one line a check, and the verdict."""
        width = max(len(check.name) for check in self.checks)
        lines = [f"{'ok  ' if check.ok else 'FAIL'} {check.name:<{width}}  {check.detail}" for check in self.checks]
        return [*lines, "verified" if self.ok else "NOT verified: do not serve this artefact"]

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return {
            "artifact": self.artifact,
            "ok": self.ok,
            "tolerance": TOLERANCE,
            "checks": [asdict(check) for check in self.checks],
        }


def verify(path: Path | str, *, runtime: str | None = None, timeout: float = TIMEOUT) -> Verification:
    """Compare trained = compressed (within what may be lost) = stored = reloaded = exported = served.

    Args:
        path: an artefact.
        runtime: what it is served in; what its manifest names where None. Of another than torch the numbers may be as
            far from those of the trained model as `_tolerance` says.
        timeout: seconds that each of the processes it starts, and each request, may take.

    Raises:
        UserError: where `path` is no artefact at all, or one without probes to compare with.
        MissingExtra: where `serve` is not installed.
    """
    artifact = Artifact.open(Path(path), check=False)
    return Verification(str(path), tuple(_checks(artifact, timeout, runtime_of(artifact, runtime))))


def _checks(artifact: Artifact, timeout: float, runtime: str) -> Iterator[Check]:
    files = _files(artifact)
    yield files
    if not files.ok:
        return
    compressed = list(_compressed(artifact.manifest))
    yield from compressed
    if not all(check.ok for check in compressed):
        return
    adapters = cast("dict[str, Any]", artifact.manifest.structure.get("adapters", {}))
    probed = {name: _stored(file) for name, file in stored_in(artifact.path, adapters).items()}
    try:
        found = reload(artifact.path, timeout)
    except ProcessFailed as fault:
        yield Check("trained = reloaded", False, str(fault))
        return
    loaded = [_weights(artifact.manifest.weights, found["weights"])]
    for adapter, stored in probed.items():
        records, trained, seen = _records(stored), _evidence(stored), found["probes"][adapter or ""]
        loaded += [
            _for(adapter, compare("trained = reloaded", records, trained, seen["evidence"])),
            _for(adapter, _inputs(records, seen["records"])),
        ]
    loaded += [_exported(file, seen) for file, seen in found["exported"].items()]
    yield from loaded
    if not all(check.ok for check in loaded):
        return
    try:
        with served(artifact.path, timeout, runtime) as url:
            for adapter, stored in probed.items():
                query = urlencode({"timeout": timeout, **({"adapter": adapter} if adapter else {})})
                answers = ask(f"{url}/v1/{found['task']}?{query}", stored["request"], timeout)
                given = [answer[found["evidence_field"]] for answer in answers]
                if runtime == "torch":
                    check = compare("trained = served", _records(stored), _evidence(stored), given)
                else:
                    check = _near(artifact.manifest, runtime, _evidence(stored), given)
                yield _for(adapter, check)
    except ProcessFailed as fault:
        yield Check("trained = served", False, str(fault))


def _records(stored: Mapping[str, Any]) -> list[Any]:
    return [probe["record"] for probe in stored["probes"]]


def _evidence(stored: Mapping[str, Any]) -> list[Any]:
    return [probe["evidence"] for probe in stored["probes"]]


def _for(adapter: str | None, check: Check) -> Check:
    """The check under the name of the adapter it was made with."""
    return check if adapter is None else replace(check, name=f"{check.name}, {adapter}")


def _files(artifact: Artifact) -> Check:
    try:
        artifact.check()
    except UserError as fault:
        return Check("files", False, str(fault))
    count = len(artifact.manifest.files)
    return Check("files", True, f"{count} files have the size and hash the manifest says", count)


def _compressed(manifest: Manifest) -> Iterator[Check]:
    """Of each compression with a limit, whether the loss that was proved is within it."""
    for step in manifest.history:
        limit = step.parameters.get("max_drop")
        if step.name != COMPRESS or not isinstance(limit, (int, float)):
            continue
        high, rows = step.effect.get("drop_high", math.nan), int(step.effect.get("rows", 0))
        drop = step.effect.get("drop", math.nan)
        said = (
            f"score lost {drop:+.4f}, at most {high:+.4f} with 97.5 % confidence, on {rows:,} rows; {limit:g} allowed"
        )
        yield Check("trained = compressed, within what may be lost", drop <= high <= limit and rows > 0, said, rows)


def _near(manifest: Manifest, runtime: str, expected: list[Any], got: list[Any]) -> Check:
    """As an export is compared, since the runtime rounds otherwise."""
    task = read_task(manifest.task, Path("manifest.json"))
    found = measure(expected, got, _tolerance(manifest), labelled=any(task.labels().values()))
    name = f"trained = served in {runtime}"
    return Check(name, found.holds, str(found), found.probes, found.max_error)


def _tolerance(manifest: Manifest) -> float:
    """What an export allows that holds such layers as this model has."""
    kinds = [one["kind"] for one in cast("dict[str, Any]", manifest.structure.get("additions", {})).values()]
    return CODED if Int8Linear.addition in kinds else TOLERANCE


def _exported(file: str, seen: Mapping[str, Any]) -> Check:
    probes = int(seen.get("probes", 0))
    return Check(f"trained = exported, {file}", seen["ok"], seen["said"], probes, seen.get("max_error"))


def _stored(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError("there are no probes to compare with", where=str(file), hint="`lexmill fit` stores them")
    stored = json.loads(file.read_text(encoding="utf-8"))
    if stored["format"] != FORMAT:
        raise UserError(f"probes of the unknown format {stored['format']}", where=str(file), hint="upgrade Lexmill")
    return stored


def _weights(trained: Mapping[str, str], loaded: Mapping[str, str]) -> Check:
    name = "trained weights = loaded weights"
    for tensor in sorted(trained.keys() | loaded.keys()):
        if trained.get(tensor) != loaded.get(tensor):
            how = "differs" if tensor in trained and tensor in loaded else "is in only one of the two"
            return Check(name, False, f"tensor {tensor} {how}", len(trained))
    return Check(name, True, f"{len(trained)} tensors are equal bit by bit", len(trained))


def _inputs(trained: list[Any], loaded: list[Any]) -> Check:
    """A request must reach the model as it did in training: same columns, same order of a pair."""
    name = "requests are read as in training"
    if len(trained) != len(loaded):
        return Check(name, False, f"the request is read as {len(loaded)} items, in training as {len(trained)}")
    for i, (want, got) in enumerate(zip(trained, loaded, strict=True)):
        if want != got:
            return Check(name, False, f"probe {i} is read as {_short(got)}, in training as {_short(want)}", i)
    return Check(name, True, f"{len(trained)} probes", len(trained))


def _short(record: Mapping[str, Any]) -> str:
    return repr({key: value if len(str(value)) < 40 else f"{str(value)[:40]}…" for key, value in record.items()})
