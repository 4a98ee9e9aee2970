"""The files of an artefact on disk: which names are allowed, what is there, and what it hashes to."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from lexmill.artifact.manifest import FILE_NAME, FileRecord
from lexmill.errors import UserError

LOCK = ".lock"
CHECKPOINTS = "checkpoints"
_PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"})


def checked(name: str, root: Path) -> Path:
    """The path of a file by its name in an artefact. Raises `UserError` for a name that is not a plain relative path
    inside it, or that names a pickle, which could run code when read."""
    pure = PurePosixPath(name)
    if not name or "\\" in name or "\0" in name or pure.is_absolute() or ".." in pure.parts or str(pure) != name:
        raise UserError(f"'{name}' is not a path inside the artefact", where=str(root))
    if pure.suffix.lower() in _PICKLES:
        raise UserError(
            f"'{name}' may hold pickled code, which is never read or written",
            where=str(root),
            hint="weights belong into .safetensors",
        )
    return root.joinpath(*pure.parts)


def names(root: Path) -> Iterator[str]:
    """All files below a directory by relative name, sorted, without the manifest and the lock. Raises `UserError` for
    a link, a pickle, or anything that is not a plain file."""
    for folder, folders, files in os.walk(root):
        folders.sort()
        here = Path(folder)
        for entry in sorted([*folders, *files]):
            path = here / entry
            name = path.relative_to(root).as_posix()
            if path.is_symlink():
                raise UserError("an artefact holds no links", where=str(path), hint="put the file itself there")
            if entry in folders or name in (FILE_NAME, LOCK):
                continue
            if not path.is_file():
                raise UserError("not a plain file", where=str(path))
            checked(name, root)
            yield name


def measure(path: Path, *, sync: bool = False) -> FileRecord:
    """Size and sha256 of a file; with `sync`, after its bytes have reached the disk."""
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return FileRecord(sha256=hashlib.file_digest(file, "sha256").hexdigest(), bytes=os.fstat(file.fileno()).st_size)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable (`fsync(2)`: a file's own sync does not cover its directory entry)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
