"""An export: a model written for another program, and the proof that it answers as its source does."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from lexmill import models
from lexmill.artifact import Artifact, Manifest, TaskRecord, Transform, Writer, create, render_card
from lexmill.config import load as read_config
from lexmill.engine import RUNTIMES, Loaded, find_runtime, probes
from lexmill.engine.files import environment, write_model
from lexmill.errors import Failure, UserError
from lexmill.export.base import Format, find
from lexmill.export.parity import Parity, measure
from lexmill.export.source import Source, open_source

NAME = "export"
"""Of the transform in a history, and the key of the manifest's structure that holds each file's parity."""


@dataclass(frozen=True)
class ExportResult:
    """A finished export; all of it stands in the artefact.

    Args:
        parity: by file, relative to the artefact, how far its answers are from those of the source.
        bytes: of all files of the format.
    """

    artifact: Artifact
    format: str
    parity: Mapping[str, Parity]
    bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "artifact": str(self.artifact.path),
            "format": self.format,
            "files": {name: one.to_dict() for name, one in self.parity.items()},
            "bytes": self.bytes,
            "seconds": self.seconds,
        }

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"{name}: {one}" for name, one in self.parity.items()]
        return [*lines, f"wrote {self.artifact.path} ({self.format}: {self.bytes / 1e6:.1f} MB)"]


def export(
    source: Path | str,
    out: Path | str,
    format: str = "onnx",
    options: Mapping[str, Any] | None = None,
    *,
    runtime: str | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> ExportResult:
    """Write an artefact that holds its source and, in a folder named like the format, the same model for others.

    Args:
        source: an artefact, or a plain Hugging Face directory (see `source.open_source`).
        out: where the artefact goes; must not exist.
        options: of the format, where they are not the defaults.
        runtime: what is to answer for the artefact where nobody names another; it is asked the probes too.
        note: is told in words what happens.

    Raises:
        UserError: the format is unknown, cannot hold this model, or its options are wrong; the runtime is unknown or
            runs another format.
        MissingExtra: what writes the format, or the runtime, is not installed.
        Failure: what was written does not answer as its source does; nothing is left of it.
    """
    began = time.perf_counter()
    out, form = Path(out), find(format)
    _refuse_other_format(runtime, form)
    chosen = read_config(form.Options, stored=dict(options or {})).value
    given = open_source(Path(source))
    with _written(given, out, form) as writer:
        folder = writer.path(f"{form.name}/model").parent
        note(f"writing {form.name}")
        files = form.write(given.loaded, folder, chosen)
        parity = {f"{form.name}/{file}": compared(form, given, folder / file, chosen) for file in files}
        _refuse_different(parity, out)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        effect = {"seconds": time.perf_counter() - began, "bytes": float(size)}
        effect |= {f"{name}/{key}": value for name, one in parity.items() for key, value in one.to_dict().items()}
        parameters: dict[str, Any] = {"format": form.name, **asdict(chosen)}
        if runtime is not None:
            effect |= _asked_in(runtime, form, given, folder / files[0], chosen, out)
            parameters["runtime"] = runtime
        _record(writer, given, Transform(name=NAME, parameters=parameters, effect=effect), parity, runtime)
    return ExportResult(Artifact.open(out), form.name, parity, size, time.perf_counter() - began)


def compared(form: Format, source: Source, file: Path, options: Any) -> Parity:
    """What a file answers to the probes, against what is stored of its source."""
    got = form.evidence(source.loaded, file, source.records)
    labelled = any(source.loaded.task.labels().values())
    return measure(source.evidence, got, form.tolerance(source.loaded, options), labelled=labelled)


def exported(artifact: Artifact, loaded: Loaded) -> Iterator[tuple[str, Parity | UserError]]:
    """Each exported file of an artefact, and how far its answers are now from the stored ones of the source; the error
    where it gives none.

    Args:
        loaded: the artefact's own; its model is not asked, but its weights are what a file must hold.
    """
    written = cast("dict[str, Any]", artifact.manifest.structure.get(NAME, {}))
    if not written:
        return
    source = Source(artifact.path, loaded, artifact, json.loads(artifact.file(probes.FILE).read_text("utf-8")))
    for file, entry in written.items():
        try:
            form = find(file.split("/")[0])
            form.check(loaded, artifact.file(file))
            got = form.evidence(loaded, artifact.file(file), source.records)
            yield file, measure(source.evidence, got, entry["tolerance"], labelled=any(loaded.task.labels().values()))
        except UserError as fault:
            yield file, fault


def _refuse_other_format(runtime: str | None, form: Format) -> None:
    if runtime is not None and find_runtime(runtime).form != form.name:
        can = ", ".join(name for name, one in RUNTIMES.items() if one.form == form.name) or "none"
        what = f"the runtime '{runtime}' does not run the format '{form.name}'"
        raise UserError(what, where="runtime", hint=f"of the runtimes that run it there are: {can}")


def _asked_in(runtime: str, form: Format, source: Source, file: Path, options: Any, out: Path) -> dict[str, float]:
    """What a runtime answers to the probes from a file, as the effect of an export has it."""
    engine = find_runtime(runtime)(source.loaded, file=file)
    got = probes.evidence_of(engine, source.records)
    labelled = any(source.loaded.task.labels().values())
    found = measure(source.evidence, got, form.tolerance(source.loaded, options), labelled=labelled)
    _refuse_different({f"{form.name}/{file.name} in {runtime}": found}, out)
    return {f"{runtime}/{key}": value for key, value in found.to_dict().items()}


def _refuse_different(parity: Mapping[str, Parity], out: Path) -> None:
    for name, one in parity.items():
        if not one.holds:
            hint = "nothing was written; please report this, with the model it happens to"
            raise Failure(f"'{name}' does not answer as its source does: {one}", where=str(out), hint=hint)


def _record(
    writer: Writer, source: Source, transform: Transform, parity: Mapping[str, Parity], runtime: str | None
) -> None:
    """Put an export into the manifest: the transform, and what is now known of each file."""
    assert writer.manifest is not None
    earlier = cast("dict[str, Any]", writer.manifest.structure.get(NAME, {}))
    folder = transform.parameters["format"]
    kept = {name: one for name, one in earlier.items() if not name.startswith(f"{folder}/")}
    found = {**kept, **{name: one.to_dict() for name, one in parity.items()}}
    history = () if source.artifact is None else source.artifact.manifest.history
    update: dict[str, Any] = {"structure": {**writer.manifest.structure, NAME: found}, "history": (*history, transform)}
    if runtime is not None:
        update["runtime"] = runtime
    writer.manifest = writer.manifest.model_copy(update=update)
    writer.path("card.md").write_text(render_card(writer.manifest, writer.out.name), "utf-8")


@contextmanager
def _written(source: Source, out: Path, form: Format) -> Generator[Writer]:
    """A writer that holds all of the source but an earlier export in this format, its manifest set."""
    if source.artifact is not None:
        transform = Transform(name=NAME)
        with source.artifact.derive(out, transform, environment=environment(), copy=_outside(form.name)) as writer:
            yield writer
        return
    task, model = source.loaded.task, source.loaded.model
    with create(out, discard_on_error=True) as writer:
        write_model(writer, source.loaded, source.path)
        writer.manifest = Manifest(
            task=TaskRecord(name=task.name, state=task.state()),
            structure=model.structure(),
            environment=environment(),
            weights=models.weights_digest(model),
        )
        yield writer


def _outside(folder: str) -> Callable[[str], bool]:
    return lambda name: not name.startswith(f"{folder}/")
