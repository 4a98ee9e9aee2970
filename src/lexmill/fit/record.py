"""What a run was asked to do, on which data and machine: written at its start, compared when it is resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lexmill.artifact import Writer
from lexmill.config import to_toml
from lexmill.errors import UserError
from lexmill.fit.config import FitConfig
from lexmill.hardware import describe

CONFIG_FILE = "run/config.toml"
INPUTS_FILE = "run/inputs.json"
ORIGINS_FILE = "run/origins.json"


def record_inputs(
    writer: Writer,
    config: FitConfig,
    origins: Mapping[str, str],
    data: Mapping[str, Any],
    note: Callable[[str], None],
) -> None:
    """Write down the config, where its values came from, the data and the machine.

    Args:
        data: the fingerprint of each file.
        note: is told where a resumed run will not be bit-identical, because the machine differs.

    Raises:
        UserError: a resumed run has another config or other data.
    """
    machine = describe()
    _refuse_other_config(writer.path(CONFIG_FILE), to_toml(config))
    inputs = writer.path(INPUTS_FILE)
    if inputs.exists():
        before = json.loads(inputs.read_text("utf-8"))
        _refuse_other_data(inputs, before["data"], data)
        for name, value in machine.items():
            if before["machine"].get(name) != value:
                was = before["machine"].get(name)
                note(f"goes on, but not bit-identically: {name} was {was or 'none'}, is {value or 'none'}")
    write_whole(writer.path(ORIGINS_FILE), json.dumps(dict(origins), indent=2))
    write_whole(inputs, json.dumps({"data": data, "machine": machine}, indent=2, ensure_ascii=False))
    write_whole(writer.path(CONFIG_FILE), to_toml(config))


def _refuse_other_config(file: Path, text: str) -> None:
    if not file.exists() or file.read_text("utf-8") == text:
        return
    old, new = file.read_text("utf-8").splitlines(), text.splitlines()
    changed = next((f"was {a}, is {b}" for a, b in zip(old, new, strict=False) if a != b), "keys differ")
    raise UserError(
        f"the interrupted run had another config: {changed}",
        where=str(file),
        hint="resume with the same flags and recipe, or remove the directory to start anew",
    )


def _refuse_other_data(file: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name, one in now.items():
        if before.get(name) != json.loads(json.dumps(one)):
            raise UserError(
                f"the {name} data has changed since the run was interrupted",
                where=str(file),
                hint="bring the file back, or remove the directory to start anew",
            )


def write_whole(file: Path, text: str) -> None:
    """Replace a file by one rename, so that a run killed meanwhile can still be resumed."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text, "utf-8")
    temporary.replace(file)
