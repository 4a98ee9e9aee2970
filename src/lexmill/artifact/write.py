"""Writing an artefact: everything happens in `OUT.partial/`, which becomes OUT by one rename."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from lexmill.artifact import tree
from lexmill.artifact.manifest import FILE_NAME, Manifest, parse
from lexmill.errors import Failure, UserError

_SCRATCH = "not to be resumed"
"""What the lock's file holds while work is done that begins anew when it was cut off."""


class Writer:
    """The unfinished artefact inside a `with create(…)` block.

    Args:
        out: the artefact's final path.

    Attributes:
        manifest: to be set before the block ends; hashes are filled in then. On resuming a run that died just
            before its rename it is already set, and the block has nothing left to do.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.partial = partial_path(out)
        self.manifest: Manifest | None = None

    def path(self, name: str) -> Path:
        """Where to write the file of this relative name, e.g. `run/events.jsonl`; its folder is made."""
        if name in (FILE_NAME, tree.LOCK) or name.split("/")[0] == tree.CHECKPOINTS:
            raise ValueError(f"'{name}' is the writer's own")
        path = tree.checked(name, self.partial)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def checkpoints(self) -> Path:
        """A folder that lives as long as the run and is not part of the artefact."""
        path = self.partial / tree.CHECKPOINTS
        path.mkdir(exist_ok=True)
        return path


def partial_path(out: Path) -> Path:
    """Where a run lives until it is complete."""
    return out.with_name(out.name + ".partial")


@contextmanager
def create(out: Path, *, resume: bool = False, discard_on_error: bool = False) -> Generator[Writer]:
    """Write a new artefact at `out`.

    When the block ends well, every file is hashed and synced, the manifest is written last, and one rename makes the
    artefact appear. When it raises, `OUT.partial/` stays where it holds a checkpoint or an earlier run's files, to be
    resumed; otherwise it is deleted.

    Args:
        resume: continue in the `OUT.partial/` that an earlier run left. Without one, a new run starts.
        discard_on_error: delete `OUT.partial/` when the block raises in any case, for work that is not resumed; and
            what a process that was killed in such a block left there.

    Raises:
        UserError: where `out` exists, where a partial run exists and `resume` is not set, or where another process
            writes it.
        Failure: where the disk is full.
    """
    writer = Writer(Path(os.path.abspath(out)))
    earlier = writer.partial.exists()
    if discard_on_error and _left_over(writer.partial):
        shutil.rmtree(writer.partial)
        earlier = False
    with _disk_full_named(writer.partial), _locked(writer, resume, _SCRATCH if discard_on_error else ""):
        if resume:
            writer.manifest = _finished(writer.partial)
        try:
            yield writer
            _commit(writer)
        except BaseException:
            resumable = earlier or any(writer.partial.glob(f"{tree.CHECKPOINTS}/*"))
            if (discard_on_error or not resumable) and writer.partial.is_dir():
                shutil.rmtree(writer.partial)
            raise


@contextmanager
def _locked(writer: Writer, resume: bool, says: str) -> Generator[None]:
    """Make or reuse `OUT.partial/` and hold an exclusive lock in it; a lock dies with its process.

    Args:
        says: what the lock's file shall hold.
    """
    out, partial = writer.out, writer.partial
    if not out.name:
        raise UserError("not a place for an artefact", where=str(out), hint="give a new directory")
    refuse_existing(out, resume=resume)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir(exist_ok=resume)
    except OSError as error:
        if is_disk_full(error):
            raise
        raise UserError(f"cannot write there: {error.strerror}", where=str(partial)) from error
    lock = partial / tree.LOCK
    with lock.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError("another process is writing this run", where=str(partial)) from error
        file.truncate(0)
        file.write(says)
        file.flush()
        refuse_existing(out, resume=True)
        yield


def _left_over(partial: Path) -> bool:
    """Whether this is what a process left that was killed in work which is not resumed."""
    try:
        with (partial / tree.LOCK).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file.read() == _SCRATCH
    except OSError:
        return False


def refuse_existing(out: Path, *, resume: bool) -> None:
    """Raise `UserError` where `out` exists, or an unfinished run for it that is not to be resumed."""
    if os.path.lexists(out):
        hint = "give another --out, or remove it; nothing is overwritten"
        raise UserError("already exists", where=str(out), hint=hint)
    partial = partial_path(out)
    if not resume and partial.exists() and not _left_over(partial):
        hint = "continue it with --resume, or remove the directory to start anew"
        raise UserError("an unfinished run is already there", where=str(partial), hint=hint)


def _finished(partial: Path) -> Manifest | None:
    """The manifest of a run that lacks only its rename, or None where files are missing or differ from it."""
    file = partial / FILE_NAME
    if not file.is_file():
        return None
    manifest = parse(file.read_bytes(), file)
    found = {name: tree.measure(partial / name) for name in _content(partial)}
    return manifest if found == manifest.files else None


def _content(partial: Path) -> list[str]:
    return [name for name in tree.names(partial) if name.split("/")[0] != tree.CHECKPOINTS]


def _commit(writer: Writer) -> None:
    if writer.manifest is None:
        raise ValueError("the writer was given no manifest")
    partial, out = writer.partial, writer.out
    temporary = partial / f"{FILE_NAME}.tmp"
    temporary.unlink(missing_ok=True)
    files = {name: tree.measure(partial / name, sync=True) for name in _content(partial)}
    writer.manifest = writer.manifest.model_copy(update={"files": files})
    with temporary.open("w", encoding="utf-8") as file:
        file.write(writer.manifest.to_json())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(partial / FILE_NAME)
    for folder, _, _ in os.walk(partial):
        tree.sync_folder(Path(folder))
    # Only now, when a crash can no longer cost more than the rename itself.
    shutil.rmtree(partial / tree.CHECKPOINTS, ignore_errors=True)
    refuse_existing(out, resume=True)
    partial.rename(out)
    (out / tree.LOCK).unlink()
    tree.sync_folder(out)
    tree.sync_folder(out.parent)


@contextmanager
def _disk_full_named(partial: Path) -> Generator[None]:
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            hint = "free some space there and continue with --resume; nothing half-written was put in place"
            raise Failure("disk full", where=str(partial), hint=hint) from error
        raise


def is_disk_full(error: BaseException) -> bool:
    """Whether an error means that the disk, or the user's share of it, is full. safetensors raises an error of its own
    that has the number only in its text."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return type(error).__module__.startswith("safetensors") and f"os error {errno.ENOSPC}" in str(error)
