"""Writing rows: a file appears only when it is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lexmill.artifact.write import is_disk_full, refuse_existing
from lexmill.errors import Failure, UserError


def write_lines(groups: Iterable[Iterable[str]], out: Path) -> None:
    """Write lines, each with its end, to a new file. What raises meanwhile leaves nothing behind."""
    refuse_existing(out, resume=True)
    partial = out.with_name(out.name + ".partial")
    try:
        with partial.open("x", encoding="utf-8") as file:
            for lines in groups:
                file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError as error:
        raise UserError("already exists", where=str(partial), hint="remove it, or give another --out") from error
    except OSError as error:
        partial.unlink(missing_ok=True)
        if is_disk_full(error):
            raise Failure("disk full", where=str(partial), hint="free some space; nothing was left behind") from error
        raise UserError(f"cannot be written: {error.strerror}", where=str(out), hint="give another --out") from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(out)


def write_rows(rows: Iterable[Mapping[str, Any]], out: Path) -> int:
    """Write rows as JSON lines to a new file, and give how many there were."""
    count = 0

    def lines() -> Iterable[str]:
        nonlocal count
        for row in rows:
            count += 1
            yield json.dumps(row, ensure_ascii=False) + "\n"

    write_lines([lines()], out)
    return count
