"""Reading an artefact: nothing in it is trusted before its hash is checked."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lexmill.artifact import tree
from lexmill.artifact.manifest import FILE_NAME, Environment, Manifest, Transform, now, parse
from lexmill.artifact.write import Writer, create, partial_path
from lexmill.errors import UserError

_COPY_AGAIN = "copy the artefact again, or go back to the run that made it"


def is_huggingface(path: Path) -> bool:
    """Whether a directory is a plain Hugging Face model: a `config.json` without a manifest."""
    return (path / "config.json").is_file() and not (path / FILE_NAME).exists()


def outlives_a_transform(name: str) -> bool:
    """Whether a file still holds after a transform: not a record of the run, an export or the card of the old model."""
    return not name.startswith(("run/", "onnx/")) and name != "card.md"


@dataclass(frozen=True)
class Artifact:
    """A finished artefact: a directory and its manifest. It is never changed; `derive` writes a new one."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: Path, *, check: bool = True) -> Artifact:
        """Read an artefact.

        Args:
            check: compare every file with its size and sha256, and look for missing and unlisted ones.

        Raises:
            UserError: naming the file that is missing, changed, unlisted, a link, a pickle or outside the directory,
                or saying what else the path is.
        """
        file = path / FILE_NAME
        try:
            text = file.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise _no_artifact(path) from error
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}", where=str(file)) from error
        artifact = cls(path, parse(text, file))
        for name in artifact.manifest.files:
            tree.checked(name, path)
        if check:
            artifact.check()
        return artifact

    def check(self) -> None:
        """Compare all files with the manifest. Raises `UserError` for the first that differs."""
        expected = self.manifest.files
        found = set(tree.names(self.path))
        for name in sorted(expected.keys() - found):
            raise UserError("the file is missing", where=str(self.path / name), hint=_COPY_AGAIN)
        for name in sorted(found - expected.keys()):
            raise UserError(
                "the manifest does not list this file",
                where=str(self.path / name),
                hint="remove it: an artefact is never changed in place",
            )
        for name, record in expected.items():
            path = self.path / name
            try:
                size = path.stat().st_size
                actual = tree.measure(path) if size == record.bytes else None
            except OSError as error:
                raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from error
            if actual is None:
                what = f"has {size} bytes instead of {record.bytes}: truncated or changed"
                raise UserError(what, where=str(path), hint=_COPY_AGAIN)
            if actual.sha256 != record.sha256:
                what = "its content does not match its sha256: damaged or changed"
                raise UserError(what, where=str(path), hint=_COPY_AGAIN)

    def file(self, name: str) -> Path:
        """The path of a listed file, or a `UserError` that says what the artefact holds."""
        if name not in self.manifest.files:
            holds = ", ".join(self.manifest.files) or "nothing"
            raise UserError(f"the artefact has no file '{name}'", where=str(self.path), hint=f"it holds: {holds}")
        return self.path / name

    @contextmanager
    def derive(
        self,
        out: Path,
        transform: Transform,
        *,
        environment: Environment | None = None,
        copy: Callable[[str], bool] = outlives_a_transform,
        resume: bool = False,
        discard_on_error: bool = True,
    ) -> Generator[Writer]:
        """Write a new artefact made from this one: `create`, with its files copied and its history carried on.

        The writer's manifest is this one's with the transform added; the block overwrites the files it changes and
        sets what else differs with `writer.manifest.model_copy(update=…)`.

        Args:
            environment: of the transform; this Python and Lexmill, and nothing about torch, where not given.
            copy: which files to take over, by name; by default all but `run/`, `onnx/` and `card.md`.
        """
        with create(out, resume=resume, discard_on_error=discard_on_error) as writer:
            if writer.manifest is None:
                for name in filter(copy, self.manifest.files):
                    shutil.copyfile(self.path / name, writer.path(name))
                changes = {
                    "history": (*self.manifest.history, transform),
                    "environment": environment or Environment(),
                    "created": now(),
                    "files": {},
                }
                writer.manifest = self.manifest.model_copy(update=changes)
            yield writer


def _no_artifact(path: Path) -> UserError:
    if not path.exists():
        if partial_path(path).is_dir():
            hint = f"continue it with --resume: it is in {partial_path(path)}"
            return UserError("this run is unfinished", where=str(path), hint=hint)
        return UserError("there is no such directory", where=str(path), hint="give the directory of an artefact")
    if not path.is_dir():
        return UserError("a file, not an artefact", where=str(path), hint="give the directory of an artefact")
    if is_huggingface(path):
        return UserError(
            "a plain Hugging Face directory, not an artefact",
            where=str(path),
            hint=f"make one of it with: lexmill import {path} --out DIR, or lexmill fit DATA --model {path}",
        )
    what = f"not an artefact: it has no {FILE_NAME}"
    return UserError(what, where=str(path), hint="give the directory of an artefact")
